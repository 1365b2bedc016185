"""report.html of a run."""

from collections.abc import Sequence
from pathlib import Path


def write_report(folder: Path, prompts: Sequence[str]) -> None:
    pass


def table(folder: Path) -> str:
    return (folder / "summary.json").read_text()
