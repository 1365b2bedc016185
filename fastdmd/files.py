"""Files that survive a kill and a power cut: written aside, flushed, then renamed.

One process at a time works in a folder.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Make a folder as `mkdir -p` does, but flush every new entry: it survives a power cut."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync_folder(path.parent)


@contextmanager
def written_beside(out: Path) -> Iterator[Path]:
    """Give a hidden folder beside `out` to write to, and put it in its place when all is flushed.

    What fails leaves `out` as it was. So does a kill, but for an instant between two renames: then `out` is
    back at the next call, which sweeps what is half-written too.
    """
    part, old = (out.with_name(f".{out.name}.{kind}") for kind in ("part", "old"))
    make_folder(out.parent)
    if old.exists() and not out.exists():
        os.rename(old, out)
    for left in (part, old):
        if left.exists():
            shutil.rmtree(left)
    part.mkdir()
    try:
        yield part
        fsync_tree(part)
        if out.exists():
            os.rename(out, old)
        os.rename(part, out)
        fsync_folder(out.parent)
    finally:
        if part.exists():
            shutil.rmtree(part)
    if old.exists():
        shutil.rmtree(old)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder of a folder, itself last."""
    for path in sorted(folder.rglob("*"), reverse=True):
        fsync_folder(path)  # a file is opened alike
    fsync_folder(folder)


def is_in(path: Path, folder: Path) -> bool:
    """Return whether a path is a folder or lies in it, by whatever links, mounts or case they are named."""
    return folder.exists() and any(each.exists() and each.samefile(folder) for each in (path, *path.parents))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep a folder to one process at a time: two would mix their rows. A killed one's lock goes with it."""
    with open(path / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"run.output_dir = '{path}': another process trains there; stop it or name another"
            ) from None
        yield


def write_atomic(path: Path, text: str) -> None:
    """Replace a small text file: readers see the old one or the new one."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
    fsync_folder(path.parent)


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
