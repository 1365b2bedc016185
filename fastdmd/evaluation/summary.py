"""What a run came to: summary.json and the videos of each model that was compared."""

import json
import math
import tomllib
from pathlib import Path
from typing import Any, NamedTuple


class Model(NamedTuple):
    """A model as the run sampled it at its end."""

    who: str  # in summary.json and samples/
    style: str  # CSS class
    steps: int
    scores: dict[str, float | None]  # "oracle", "swd"
    videos: list[Path]

    @property
    def name(self) -> str:
        return self.who.split("_")[0]

    @property
    def label(self) -> str:
        return f"{self.name}, {self.steps} {'step' if self.steps == 1 else 'steps'}"

    @property
    def cells(self) -> list[str]:
        scores = ((self.scores["oracle"], ".3f"), (self.scores["swd"], ".4f"))
        return [
            self.name,
            str(self.steps),
            *("-" if value is None else f"{value:{form}}" for value, form in scores),
        ]


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def read_run(folder: Path) -> tuple[dict[str, Any], list[Model]]:
    """Read summary.json and the models that the run compared, the student last; it may be alone."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    many = config["validation"]["teacher_steps"]
    few = summary["student_steps"]
    models = []
    for who, style, steps in (
        ("teacher", "many", many),
        ("teacher_few", "few", few),
        ("student", "student", few),
    ):
        videos = sorted((folder / "samples" / who).glob("*.webp"), key=lambda path: int(path.stem))
        models.append(Model(who, style, steps, summary["scores"][who], videos))
    return summary, [
        m for m in models if m.who == "student" or m.videos or any(map(finite, m.scores.values()))
    ]
