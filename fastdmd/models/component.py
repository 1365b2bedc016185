"""One network of a diffusers folder, FOLDER/NAME: its config.json and safetensors weights; and the folder's index."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

WEIGHTS = "diffusion_pytorch_model"


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # not UTF-8 and not JSON are both ValueErrors
        raise ValueError(f"{path} is not JSON; download or save the folder again") from None


def read_config(folder: Path, name: str, class_name: str, model: str) -> dict[str, Any]:
    """`folder/name/config.json`; ValueError when it is of another class."""
    raw = read_json(folder / name / "config.json")
    if (given := raw.get("_class_name")) != class_name:
        raise ValueError(f"{folder}: {name} is a {given}, not a {class_name}; name a diffusers folder of {model}")
    return raw


def known(raw: Mapping[str, Any], cls: Any) -> dict[str, Any]:
    """What a config.json says of a dataclass's fields, lists as tuples."""
    names = {f.name for f in fields(cls)}
    return {key: tuple(x) if isinstance(x, list) else x for key, x in raw.items() if key in names}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a component, from one safetensors file or from shards with an index."""
    single, index = (path / f"{WEIGHTS}.safetensors{end}" for end in ("", ".index.json"))
    if single.is_file():
        return _read(single)
    if not index.is_file():
        raise ValueError(
            f"{path.parent}: {path.name} has neither {single.name} nor {index.name}; only safetensors are read, "
            "so save it with safe_serialization"
        )
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {key: value for name in names for key, value in _read(path / name).items()}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as e:
        raise ValueError(f"{path} cannot be read ({e}); download or save the folder again") from None


def check_fit(path: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """ValueError where a component's weights are not those of the network that its config.json describes."""
    wrong = [f"{name} is missing" for name in expected if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in expected]
    wrong += [
        f"{name} is {list(weights[name].shape)}, not {list(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{path.parent}: the weights of {path.name} do not fit its config.json: {', '.join(wrong[:3])}{more}; "
            "download or save the folder again"
        )


def write(path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """A component as diffusers' save_pretrained writes it."""
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
    """model_index.json with `index` and the frozen components; those that `source` has are copied from it.

    A component's class is the one that the source's own index names, and `components` has it where there is none.
    """
    original = source / "model_index.json" if source else None
    given = json.loads(original.read_text()) if original and original.is_file() else {}
    for name in components:
        if source and (source / name).is_dir():
            shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
    frozen = {name: given.get(name, kind) for name, kind in components.items()}
    (folder / "model_index.json").write_text(json.dumps({**index, **frozen}, indent=2) + "\n")
