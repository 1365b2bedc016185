"""What a run tells: metrics.jsonl, mirrored to tensorboard and wandb, and one live progress line."""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fastdmd.checkpoint import write_atomic


@dataclass(frozen=True, kw_only=True)
class Config:
    every: int = 10
    backends: tuple[Literal["tensorboard", "wandb"], ...] = ()
    project: str = "fastdmd"
    run_name: str | None = None

    def problems(self):
        if self.every < 1:
            yield "every", f"{self.every} is not positive; 1 writes every step"


class Mirror(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, config: Config, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "logging.backends: 'tensorboard' is not installed; pip install 'fastdmd[tensorboard]'"
            ) from None
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    def __init__(self, config: Config, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError("logging.backends: 'wandb' is not installed; pip install 'fastdmd[wandb]'") from None
        self.run = wandb.init(
            project=config.project, name=config.run_name or folder.name, dir=str(folder), resume="allow"
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


MIRRORS = {"tensorboard": TensorBoard, "wandb": Wandb}


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to a step. A last line that a killed run left half-written is dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines[:-1]]  # a whole line ends in a newline
    return [row for row in rows if last_step is None or row["step"] <= last_step]


class RunLog:
    """metrics.jsonl of a run: one object a line with "step" and named numbers; rows past `step` are dropped at a resume."""

    def __init__(self, config: Config, folder: Path, step: int) -> None:
        self.config, self.path = config, folder / "metrics.jsonl"
        rows = read_metrics(self.path, step)
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.file = self.path.open("a", encoding="utf-8")
        self.mirrors: list[Mirror] = [MIRRORS[name](config, folder) for name in config.backends]

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        numbers = {name: value for name, value in values.items() if value is not None}
        for mirror in self.mirrors:
            mirror.write(step, numbers)

    def close(self) -> None:
        self.file.close()
        for mirror in self.mirrors:
            mirror.close()


class Progress:
    """One line on stderr with an ETA: rewritten in place on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.first = what, total, done
        self.start = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def show(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self.shown < (0.2 if self.live else 10) and done < self.total:
            return
        self.shown = now
        elapsed, count = now - self.start, done - self.first
        each = elapsed / count if count else 0.0
        left = f"ETA {clock(each * (self.total - done))}" if done < self.total else f"took {clock(elapsed)}"
        line = f"{self.what} {done}/{self.total}  {each:.2f} s each  {left}  {note}"
        end = "\n" if not self.live or done == self.total else ""
        print(("\r\x1b[2K" if self.live else "") + line, end=end, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
