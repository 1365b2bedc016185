"""Checkpoints: a folder of safetensors with a JSON manifest.

A run that is killed at any instant finds the last whole one: it is written to a hidden folder, flushed to
disk, then renamed, so that a folder named `step_NNNNNNNN` is complete. There are no pickles.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdmd.files import fsync_folder, make_folder, sha256, write_atomic

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Config:
    every: int = 500
    keep: int = 3
    resume: Literal["latest", False] | str = "latest"

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.every < 1:
            yield "every", f"{self.every} is not positive; a checkpoint is what a killed run goes on from"
        if self.keep < 1:
            yield "keep", f"{self.keep} is not positive; keep at least 1"
        if self.resume not in ("latest", False) and not (Path(self.resume) / MANIFEST).is_file():
            yield (
                "resume",
                f"{self.resume!r} has no {MANIFEST}; give a step_NNNNNNNN folder, 'latest' or false",
            )


def complete(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob("step_" + 8 * "[0-9]") if p.is_dir())


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write `step_NNNNNNNN`, one safetensors file per name and the manifest.

    Then drop all checkpoints but the newest `keep`.
    """
    final, part = folder / f"step_{step:08d}", folder / f".part-{step:08d}"
    make_folder(folder)
    sweep(folder)
    part.mkdir()
    files = {}
    for name, values in tensors.items():
        path = part / f"{name}.safetensors"
        save_file({key: value.detach().contiguous() for key, value in values.items()}, path)
        with open(path, "rb") as f:
            os.fsync(f.fileno())
        files[path.name] = sha256(path)
    write_atomic(part / MANIFEST, json.dumps({"step": step, "files": files, **state}, indent=1))
    for path in complete(folder):
        if path >= final:  # this run has resumed from before it
            _remove(path)
    os.rename(part, final)
    fsync_folder(folder)
    prune(folder, keep)
    return final


def prune(folder: Path, keep: int) -> None:
    """Leave the newest `keep` checkpoints, and nothing half-written."""
    for old in complete(folder)[:-keep]:
        _remove(old)
    sweep(folder)


def _remove(path: Path) -> None:
    """Rename first, so that a half-removed checkpoint never looks like a whole one."""
    doomed = path.with_name(f".part-old-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for part in folder.glob(".part-*"):
        shutil.rmtree(part)


def find(folder: Path, resume: str | bool) -> Path | None:
    """Return what `checkpoint.resume` names: the newest of `folder`, a given checkpoint, or nothing."""
    if resume is False:
        return None
    if resume == "latest":
        found = complete(folder)
        return found[-1] if found else None
    path = Path(str(resume))
    if not (path / MANIFEST).is_file():
        raise ValueError(
            f"checkpoint.resume = {resume!r} has no {MANIFEST}; give a step_NNNNNNNN folder, or 'latest'"
        )
    return path


def load(path: Path, device: str = "cpu") -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Return (manifest, tensors by file name); ValueError for a file that is not what was written."""
    remedy = f"is damaged; remove {path} to go on from the checkpoint before it"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not UTF-8 and not JSON are both ValueErrors
        raise ValueError(f"{path / MANIFEST} {remedy}") from None
    tensors = {}
    for name, digest in manifest["files"].items():
        if not (path / name).is_file() or sha256(path / name) != digest:
            raise ValueError(f"{path / name} {remedy}")
        try:
            tensors[Path(name).stem] = load_file(path / name, device=device)
        except SafetensorError as e:  # it was written so: its hash is right
            raise ValueError(f"{path / name} ({e}) {remedy}") from None
    return manifest, tensors
