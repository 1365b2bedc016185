"""Files that survive a kill and a power cut: written aside, flushed, renamed; one process at a time in a folder."""

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
    """`mkdir -p` that survives a power cut: every new entry is flushed."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync_folder(path.parent)


@contextmanager
def written_beside(out: Path) -> Iterator[Path]:
    """Give a hidden folder beside `out` to write to, and put it in the place of `out` when all is written.

    A process that is killed meanwhile leaves `out` as it was, but for an instant between two renames.
    """
    part, old = (out.with_name(f".{out.name}.{kind}") for kind in ("part", "old"))
    make_folder(out.parent)
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir()
    yield part
    if out.exists():
        os.rename(out, old)
    os.rename(part, out)
    fsync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time trains in a folder: two would mix their rows. A killed one's lock goes with it."""
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
