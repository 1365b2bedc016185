"""One network of a diffusers folder, FOLDER/NAME: its config.json and weights; and the folder's index."""

import json
import math
import shutil
from collections.abc import Callable, Container, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastdmd.models.lora import clean, set_parameter
from fastdmd.models.lowbit import PACKED, LowBitLinear
from fastdmd.models.net import Net

WEIGHTS = "diffusion_pytorch_model"
# of every load by diffusers and transformers: no code of a folder runs, nothing but safetensors is read, and
# nothing is fetched
SAFE: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # not UTF-8 and not JSON are both ValueErrors
        raise ValueError(f"{path} is not JSON; download or save the folder again") from None


def read_config(folder: Path, name: str, class_name: str, model: str) -> dict[str, Any]:
    """Read `folder/name/config.json`; ValueError when it is of another class."""
    raw = read_json(folder / name / "config.json")
    if (kind := raw.get("_class_name")) != class_name:
        raise ValueError(
            f"{folder}: {name} is a {kind}, not a {class_name}; name a diffusers folder of {model}"
        )
    return raw


def known(raw: Mapping[str, Any], cls: Any) -> dict[str, Any]:
    """Return what a config.json says of a dataclass's fields, lists as tuples."""
    names = {f.name for f in fields(cls)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key in names:
            values[key] = tuple(cast("list[Any]", value)) if isinstance(value, list) else value
    return values


@dataclass(frozen=True)
class Weights:
    """The tensors of a component, by the names of a network.

    Shapes are there at once, values one by one as they are read.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, tuple[Path, str] | None]  # file, and the name there; None: zeros

    def renamed(self, change: Callable[[str], str]) -> "Weights":
        """Return the same tensors by other names."""
        shapes = {change(name): shape for name, shape in self.shapes.items()}
        places = {change(name): place for name, place in self.places.items()}
        return replace(self, shapes=shapes, places=places)

    def with_zeros(self, shapes: Mapping[str, tuple[int, ...]]) -> "Weights":
        """Return them with zeros of these shapes beside."""
        places = {**self.places, **dict.fromkeys(shapes)}
        return replace(self, shapes={**self.shapes, **shapes}, places=places)

    def zeros(self) -> set[str]:
        """Return the names of the tensors that are in no file."""
        return {name for name, place in self.places.items() if place is None}

    def without(self, names: Container[str]) -> "Weights":
        """Return the tensors but for some."""
        shapes = {name: shape for name, shape in self.shapes.items() if name not in names}
        return replace(self, shapes=shapes, places={name: self.places[name] for name in shapes})

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Read every tensor once, file by file; only one is in memory at a time."""
        files: dict[Path, dict[str, str]] = {}
        for name, place in self.places.items():
            if place is None:
                yield name, torch.zeros(self.shapes[name])
            else:
                files.setdefault(place[0], {})[place[1]] = name
        for file, names in files.items():
            with open_tensors(file) as tensors:
                for there, name in names.items():
                    yield name, tensors.get_tensor(there)

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """Raise ValueError where they are not those of the network that config.json describes."""
        wrong = [f"{name} is missing" for name in expected if name not in self.shapes]
        wrong += [f"{name} is unknown" for name in self.shapes if name not in expected]
        wrong += [
            f"{name} is {list(self.shapes[name])}, not {list(value.shape)}"
            for name, value in expected.items()
            if name in self.shapes and self.shapes[name] != tuple(value.shape)
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(
                f"{self.path.parent}: the weights of {self.path.name} do not fit its config.json: "
                f"{', '.join(wrong[:3])}{more}; download or save the folder again"
            )


@dataclass(frozen=True)
class RandomWeights(Weights):
    """Weights of no file, for what depends on shapes alone. Products keep the scale of what they take."""

    device: torch.device

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator(self.device).manual_seed(0)
        for name, place in self.places.items():
            shape = self.shapes[name]
            if place is None or (len(shape) == 1 and not name.endswith("weight")):
                yield name, torch.zeros(shape, device=self.device)
            elif len(shape) == 1:  # of a norm
                yield name, torch.ones(shape, device=self.device)
            else:
                value = torch.randn(shape, generator=generator, device=self.device)
                yield name, value / math.prod(shape[1:]) ** 0.5


def random_weights(net: Net, path: Path, gate: str | None, device: torch.device) -> Weights:
    """Return random weights of a network, made on a device, but zeros for gates of sparse attention."""
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    gates = {name for name in shapes if gate is not None and f".{gate}." in name}
    places = {name: None if name in gates else (path, name) for name in shapes}
    return RandomWeights(path, shapes, places, device)


def open_weights(path: Path) -> Weights:
    """Return the tensors of a component, from one safetensors file or from shards with an index."""
    single, index = (path / f"{WEIGHTS}.safetensors{end}" for end in ("", ".index.json"))
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = [path / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    else:
        raise ValueError(
            f"{path.parent}: {path.name} has neither {single.name} nor {index.name}; only safetensors are "
            "read, so save it with safe_serialization"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, tuple[Path, str]] = {}
    for file in files:
        for name, shape in _shapes(file).items():
            shapes[name], places[name] = shape, (file, name)
    return Weights(path, shapes, places)


@contextmanager
def open_tensors(file: Path, remedy: str = "download or save the folder again") -> Generator[Any, None, None]:
    """Open a safetensors file, to read tensors one by one; ValueError where it cannot be read."""
    try:
        opened: Any = safe_open(file, "pt")
        with opened as tensors:
            yield tensors
    except (FileNotFoundError, SafetensorError) as e:
        raise ValueError(f"{file} cannot be read ({e}); {remedy}") from None


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors; only its header is read."""
    with open_tensors(file) as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in list(tensors.keys())}


def read_into(
    net: Net,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
    trained: Container[str] = (),
    host: Container[str] = (),
) -> dict[str, Tensor]:
    """Read a network's tensors one by one, each cast as it is read, and return the masters of `trained`.

    Peak memory is the network in its compute dtype, the float32 masters of what is trained and rounded, and
    one tensor. Names are those without adapters; a copy of a module that a role owns starts as the module.
    What is in `host` stays in host memory.
    """
    names: dict[str, list[str]] = {}
    for name, _ in net.named_parameters():
        names.setdefault(clean(name).replace(f".{PACKED}", ".weight"), []).append(name)
    masters: dict[str, Tensor] = {}
    for name, value in weights:
        as_cast = torch.float32 if net.keeps_float32(name) else dtype
        for there in names[name]:
            owner = net.get_submodule(there.rpartition(".")[0])
            where = torch.device("cpu") if there in host else device
            if isinstance(owner, LowBitLinear) and there.endswith(PACKED):
                owner.load(value, where)
                continue
            # a copy: tensors read on the CPU are views of the file, which may be written over during a run
            set_parameter(net, there, value.to(where, as_cast, copy=True))
            if there in trained and as_cast != torch.float32:
                masters[there] = value.to(device, torch.float32, copy=True)
    return masters


def write(path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a component as diffusers' save_pretrained does."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_torch_state_dict(
        {key: value.detach().contiguous() for key, value in weights.items()},
        path,
        filename_pattern=WEIGHTS + "{suffix}.safetensors",
        safe_serialization=True,
    )


def write_index(
    folder: Path, index: Mapping[str, Any], components: Mapping[str, list[str]], source: Path | None
) -> None:
    """Write model_index.json, and copy the frozen components that `source` has.

    A component's class is the one that the source's own index names, and `components` has it where there is
    none. One that the folder lacks is [null, null]: a pipeline that is given None for it opens without it.
    """
    original = source / "model_index.json" if source else None
    named: dict[str, Any] = json.loads(original.read_text()) if original and original.is_file() else {}
    for name in components:
        if source and (source / name).is_dir():
            shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
    frozen = {
        name: named.get(name, kind) if (folder / name).is_dir() else [None, None]
        for name, kind in components.items()
    }
    (folder / "model_index.json").write_text(json.dumps({**index, **frozen}, indent=2) + "\n")
