"""What a run tells: metrics.jsonl, mirrored to tensorboard and wandb, and one live progress line."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from fastdmd.files import write_atomic

Row = dict[str, Any]  # of metrics.jsonl: "step" and named numbers, None where a score has no value


@dataclass(frozen=True, kw_only=True)
class Config:
    every: int = 10
    backends: tuple[Literal["tensorboard", "wandb"], ...] = ()
    project: str = "fastdmd"
    run_name: str | None = None

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.every < 1:
            yield "every", f"{self.every} is not positive; 1 writes every step"


def numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the values with None for each that is not finite: JSON has no NaN."""
    return {name: x if x is not None and math.isfinite(x) else None for name, x in values.items()}


class Mirror(Protocol):
    """Another place for metrics.jsonl, which shows a row once, however often a run is killed.

    It is made of (config, run's folder, rows of metrics.jsonl so far).
    """

    def write(self, step: int, values: Mapping[str, float | None]) -> None: ...

    def sync(self) -> None:
        """Put what was written out of reach of a kill."""
        ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard, one per start.

    A newer one takes back what older ones have past its first step.
    """

    def __init__(self, config: Config, folder: Path, rows: Sequence[Row]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "logging.backends: 'tensorboard' is not installed; pip install 'fastdmd[tensorboard]'"
            ) from None
        last = rows[-1]["step"] if rows else -1
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=last + 1)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        for name, value in numbers(values).items():
            self.writer.add_scalar(name, value, step)

    def sync(self) -> None:
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class Wandb:
    """One wandb run over all resumes, by the id in RUN/wandb_id.

    It is given the rows that it lacks: online what a kill kept from the server, offline all of them, because
    syncing replaces a run and does not append to it.
    """

    def __init__(self, config: Config, folder: Path, rows: Sequence[Row]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError(
                "logging.backends: 'wandb' is not installed; pip install 'fastdmd[wandb]'"
            ) from None
        path = folder / "wandb_id"
        self.run = wandb.init(
            project=config.project,
            name=config.run_name or folder.name,
            dir=str(folder),
            id=path.read_text() if rows and path.exists() else None,
            resume="allow",
        )
        write_atomic(path, self.run.id)
        first = self.run.step
        for row in rows:
            if row["step"] >= first:
                self.write(row["step"], {name: value for name, value in row.items() if name != "step"})

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        self.run.log(numbers(values), step=step)

    def sync(self) -> None:
        pass  # a process of its own writes

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=1 if failed else 0)


MIRRORS = {"tensorboard": TensorBoard, "wandb": Wandb}


def read_metrics(path: Path, last_step: int | None = None) -> list[Row]:
    """Read the lines of metrics.jsonl up to a step; a half-written last one of a killed run is dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines[:-1]]  # a whole line ends in a newline
    return [row for row in rows if last_step is None or row["step"] <= last_step]


class RunLog:
    """metrics.jsonl of a run, one object per line.

    Rows past `step`, which a resume makes again, are dropped.
    """

    def __init__(self, config: Config, folder: Path, step: int) -> None:
        self.config, self.path = config, folder / "metrics.jsonl"
        # at 0 a run starts anew; an older version wrote NaN
        rows = [finite(row) for row in read_metrics(self.path, step)] if step else []
        write_atomic(self.path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        self.file = self.path.open("a", encoding="utf-8")
        self.mirrors: list[Mirror] = [MIRRORS[name](config, folder, rows) for name in config.backends]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.file.close()
        for mirror in self.mirrors:
            mirror.close(failed=kind is not None)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        values = finite(values)
        self.file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self.file.flush()
        for mirror in self.mirrors:
            mirror.write(step, values)

    def sync(self) -> None:
        """Flush to disk; a checkpoint must not outlive the rows of its steps."""
        os.fsync(self.file.fileno())
        for mirror in self.mirrors:
            mirror.sync()


class Progress:
    """One line on stderr with an ETA: rewritten in place on a terminal, every ten seconds elsewhere."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what = what
        self.total = total
        self.first = done
        self.start = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()
        self.open = False  # a line without its end is on the terminal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.open:
            print(file=sys.stderr)

    def show(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self.shown < (0.2 if self.live else 10) and done < self.total:
            return
        self.shown = now
        elapsed, count = now - self.start, done - self.first
        each = elapsed / count if count else 0.0
        left = f"ETA {clock(each * (self.total - done))}" if done < self.total else f"took {clock(elapsed)}"
        line = f"{self.what} {done}/{self.total}  {each:.2f} s each  {left}  {note}"
        self.open = self.live and done < self.total
        print(
            ("\r\x1b[2K" if self.live else "") + line,
            end="" if self.open else "\n",
            file=sys.stderr,
            flush=True,
        )


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
