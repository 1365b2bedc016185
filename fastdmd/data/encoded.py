"""Latents and captions that were encoded beforehand: a folder of safetensors shards, read sample by sample.

    manifest.json         {"latent_shape": [16, 21, 60, 104], "files": {"00000.safetensors": 256, ..},
                           "prompts": ["some captions to show", ..]}; files are the shards with their samples
    00000.safetensors     x0 [n, *latent_shape], text [n, S, D]; for SDXL pooled [n, P] too
    uncond.safetensors    the empty prompt, the other side of guidance: text [1, S, D]; for SDXL it is zeros,
                          and there is no file

x0 is what the network denoises: the VAE's latents, normalised as its diffusers pipeline does. Any float
dtype; text and pooled are what the model's text encoder gives. Samples are drawn alike from all folders
together, and like any batch they are a function of (seed, step, sample). B batch, S text tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastdmd.batch import Cond
from fastdmd.models.component import open_tensors, read_json

MANIFEST, UNCOND = "manifest.json", "uncond.safetensors"
REMEDY = "encode the folder again"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """A folder, without its tensors."""

    folder: Path
    shards: tuple[tuple[Path, int], ...]  # with their samples
    shapes: Mapping[str, Shape]  # of one sample's x0, text and, of SDXL, pooled
    prompts: tuple[str, ...]

    def uncond(self) -> Cond:
        """Return the condition of the empty prompt, for one sample."""
        keys = [key for key in self.shapes if key != "x0"]
        if "pooled" in keys:
            return Cond(**{key: torch.zeros(1, *self.shapes[key]) for key in keys})
        with open_tensors(self.folder / UNCOND, REMEDY) as file:
            return Cond(**{key: file.get_tensor(key) for key in keys})


def read_folders(folders: Sequence[str], latent_shape: Shape) -> list[Encoded]:
    """Read all folders of `data.sources`.

    Raise ValueError for a folder that contradicts its manifest, or has other shapes than needed.
    """
    read = [_read(folder) for folder in folders]
    for folder, encoded in zip(folders, read, strict=True):
        if encoded.shapes["x0"] != latent_shape:
            raise ValueError(
                f"{folder!r} has latents of {list(encoded.shapes['x0'])}, and data.frames and "
                f"data.resolution give {list(latent_shape)}; use those that it was encoded at"
            )
        if encoded.shapes != read[0].shapes:
            shapes = [{key: list(shape) for key, shape in each.shapes.items()} for each in (read[0], encoded)]
            raise ValueError(
                f"{folders[0]!r} has samples of {shapes[0]} and {folder!r} of {shapes[1]}; use one of them"
            )
    return read


def _read(folder: str) -> Encoded:
    """Read the manifest, and check it against the header of every shard."""
    path = Path(folder) / MANIFEST
    kinds = {"latent_shape": list, "files": dict, "prompts": list}
    if not path.is_file():
        raise ValueError(f"{folder!r} has no {MANIFEST}; name a folder of encoded latents")
    raw = read_json(path)
    if wrong := [key for key, kind in kinds.items() if not isinstance(raw.get(key), kind) or not raw[key]]:
        raise ValueError(f"{path} has no {', '.join(wrong)}; {REMEDY}")
    shards = tuple((Path(folder) / name, n) for name, n in raw["files"].items())
    headers = [_shapes(shard) for shard, _ in shards]
    shapes = {"x0": tuple(raw["latent_shape"])}
    for key, axes in {"text": "[n, S, D]", "pooled": "[n, P]"}.items():  # as the first shard has them
        shape = headers[0].get(key, ())
        if key == "pooled" and not shape:
            continue
        if len(shape) != axes.count(",") + 1:
            raise ValueError(
                f"{shards[0][0]}: {key} is {list(shape) or 'missing'}, and has to be {axes}; {REMEDY}"
            )
        shapes[key] = shape[1:]
    for (shard, n), header in zip(shards, headers, strict=True):
        _check(shard, header, {key: (n, *shape) for key, shape in shapes.items()})
    if "pooled" not in shapes:
        uncond = Path(folder) / UNCOND
        _check(uncond, _shapes(uncond), {"text": (1, *shapes["text"])})
    return Encoded(Path(folder), shards, shapes, tuple(raw["prompts"]))


def _shapes(shard: Path) -> dict[str, Shape]:
    """Return the shapes of a file's tensors; only its header is read."""
    if not shard.is_file():
        raise ValueError(f"{shard.parent} has no {shard.name}; {REMEDY}")
    with open_tensors(shard, REMEDY) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}


def _check(shard: Path, given: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    for key, shape in expected.items():
        if given.get(key) != shape:
            is_ = list(given.get(key, ())) or "missing"
            raise ValueError(f"{shard}: {key} is {is_}, and has to be {list(shape)}; {REMEDY}")


def read_sample(shard: Path, row: int, keys: Sequence[str]) -> dict[str, Tensor]:
    """Read one row [1, ..] of a shard's tensors, and no other."""
    with open_tensors(shard, REMEDY) as file:
        return {key: file.get_slice(key)[row : row + 1] for key in keys}
