"""What a run came to: report.html, the scores as text for a terminal, and one moving montage.

The page stands alone and runs nothing: inline CSS and SVG, pictures as data URIs, all text escaped.
"""

import base64
import io
import json
import math
import tomllib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageSequence

from fastdmd import chart
from fastdmd.checkpoint import write_atomic
from fastdmd.log import clock, read_metrics

INK, FAINT, GAP, CAPTION = "#1d1f23", "#666b73", 12, 24  # of the montage, lengths in pixels
CELL, LIMIT = 192, 384  # pixels: small pictures grow in whole steps up to CELL wide, large ones shrink to LIMIT
COLUMNS = ("model", "steps", "oracle", "sliced Wasserstein")
ORACLE, SWD = "share of videos with everything right", "distance to real videos"
# title, what it shows, {metric: (name of the line, CSS class)}
CHARTS: tuple[tuple[str, str, dict[str, tuple[str, str]]], ...] = (
    ("Oracle", ORACLE, {"valid/oracle": ("student", "student")}),
    ("Sliced Wasserstein", SWD, {"valid/swd": ("student", "student")}),
    ("Loss", "as each phase minimises it", {f"train/loss_{role}": (role, role) for role in ("student", "critic")}),
    ("Gradient norm", "before clipping", {f"train/grad_norm_{role}": (role, role) for role in ("student", "critic")}),
    (
        "Score gap",
        "mean |gradient| on the student's x0, mean |critic - teacher|",
        {"train/dmd_grad_abs": ("gradient", "student"), "train/score_gap": ("gap", "gap")},
    ),
    ("Step time", "seconds", {"perf/step_s": ("step time", "plain")}),
)
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1d1f23; --faint: #666b73; --rule: #e4e6ea;
  --student: #0a66c2; --critic: #b8500b; --gap: #0b7a62; }
@media (prefers-color-scheme: dark) { :root { --page: #131417; --ink: #e8e9ec; --faint: #9aa0a9; --rule: #2c2f35;
  --student: #6db3ff; --critic: #f2a25c; --gap: #4fc9ac; } }
* { box-sizing: border-box; margin: 0; }
body { max-width: 1040px; margin: auto; padding: 3rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.75rem; line-height: 1.2; letter-spacing: -.015em; overflow-wrap: anywhere; }
summary { cursor: pointer; } h2, summary { font-size: 1.1rem; font-weight: 650; margin: 3rem 0 .9rem; }
h3 { font-size: .95rem; font-weight: 600; }
p, thead { font-size: .85rem; color: var(--faint); }
table { border-collapse: collapse; } th { font-weight: inherit; text-align: left; }
.scores { margin-bottom: .6rem; } .scores tr { border-bottom: 1px solid var(--rule); }
.scores :is(th, td) { padding: .4rem 0 .4rem 2rem; text-align: right; }
.scores th:first-child { padding-left: 0; text-align: left; }
.videos { table-layout: fixed; width: 100%; }
.videos :is(th, td) { padding: 0 .75rem .75rem 0; overflow-wrap: break-word; }
img { display: block; max-width: 100%; height: auto; border-radius: 3px; } .pixels { image-rendering: pixelated; }
h2 + p { margin: -.7rem 0 1.2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 2.25rem 2.5rem; }
.student { color: var(--student); } .critic { color: var(--critic); } .gap { color: var(--gap); }
.plain, .scores tbody tr { color: var(--ink); } .scores .student { font-weight: 650; }
pre { overflow-x: auto; padding-left: 1rem; border-left: 2px solid var(--rule); font: .8rem/1.5 monospace; }
@media (max-width: 600px) { .scores :is(th, td) { padding-left: 1rem; } .videos { font-size: .8rem; } }
"""


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
        return f"{self.name}, {self.steps} step{'s' * (self.steps != 1)}"

    @property
    def cells(self) -> list[str]:
        scores = ((self.scores["oracle"], ".3f"), (self.scores["swd"], ".4f"))
        return [self.name, str(self.steps), *("-" if value is None else f"{value:{form}}" for value, form in scores)]


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def read_run(folder: Path) -> tuple[dict[str, Any], list[Model]]:
    """summary.json, and the models that the run compared, the student last; without a teacher it is alone."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    many = config["validation"]["teacher_steps"]
    few = summary["student_steps"]
    models = []
    for who, style, steps in (("teacher_50", "many", many), ("teacher_few", "few", few), ("student", "student", few)):
        videos = sorted((folder / "samples" / who).glob("*.webp"), key=lambda path: int(path.stem))
        models.append(Model(who, style, steps, summary["scores"][who], videos))
    return summary, [m for m in models if m.who == "student" or m.videos or any(map(finite, m.scores.values()))]


def table(folder: Path) -> str:
    """The scores and the cost of a run as aligned text."""
    summary, models = read_run(folder)
    rows = [list(COLUMNS), *(model.cells for model in models)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    scores = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    cost = [f"steps        {summary['steps']}", f"seconds      {summary['seconds']:.1f}"]
    return "\n".join([*scores, "", *cost, f"peak memory  {summary['peak_mem_gb']:.2f} GB"])


def score_table(models: Sequence[Model]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in COLUMNS)
    rows = ""
    for model in models:
        first, *rest = model.cells
        rows += f'<tr class="{model.style}"><th scope="row">{first}</th><td>{"</td><td>".join(rest)}</td></tr>'
    note = f"<p>Oracle: {ORACLE}, higher is better. Sliced Wasserstein: {SWD}, lower is better.</p>"
    return f'<table class="scores"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{note}'


def charts(folder: Path, summary: dict[str, Any], models: Sequence[Model]) -> str:
    """What metrics.jsonl tells; the final scores end the student's curves, and the teacher's are levels."""
    *teachers, student = models
    rows = read_metrics(folder / "metrics.jsonl")
    if not any("valid/oracle" in row and row["step"] == summary["steps"] for row in rows):
        rows.append({"step": summary["steps"], **{f"valid/{name}": value for name, value in student.scores.items()}})
    last, figures = max(1, *(row["step"] for row in rows)), ""
    for title, note, metrics in CHARTS:
        levels, lines = {}, []
        for metric, (name, style) in metrics.items():
            points = [(row["step"], row[metric]) for row in rows if finite(row.get(metric))]
            lines += [chart.Line(name, style, points)] if points else []
            levels |= {(t.label, t.style): t.scores.get(metric.removeprefix("valid/")) for t in teachers}
        levels = {name: value for name, value in levels.items() if finite(value)}
        bounds = (0.0, 1.0) if "valid/oracle" in metrics else None
        figures += chart.chart(title, note, lines, levels, last, bounds) if lines else ""
    return f'<p>In long curves the logged steps are faint, their median bold.</p><div class="charts">{figures}</div>'


def fit(frame: Image.Image) -> Image.Image:
    """Small pictures in whole multiples of their pixels, large ones reduced."""
    if frame.width > LIMIT:
        return frame.resize((LIMIT, round(frame.height * LIMIT / frame.width)), Image.Resampling.LANCZOS)
    n = max(1, CELL // frame.width)
    return frame.resize((n * frame.width, n * frame.height), Image.Resampling.NEAREST)


def film(path: Path) -> list[tuple[Image.Image, int]]:
    """(frame, milliseconds) of a WebP, fitted. The encoder has joined equal frames; a still lasts 0."""
    with Image.open(path) as image:  # converting loads the frame, which sets its duration
        return [(fit(frame.convert("RGB")), int(frame.info["duration"])) for frame in ImageSequence.Iterator(image)]


def save(path: Path | io.BytesIO, frames: Sequence[tuple[Image.Image, int]], lossless: bool) -> None:
    (first, _), *rest = frames
    times = [ms for _, ms in frames]
    images = [image for image, _ in rest]
    first.save(path, "WEBP", save_all=True, append_images=images, duration=times, loop=0, lossless=lossless, quality=80)


def picture(path: Path, alt: str) -> str:
    """An <img> with the file in it; a large one reduced."""
    data = io.BytesIO(path.read_bytes())
    with Image.open(path) as image:
        width, height = image.size
    if width > LIMIT:
        save(data := io.BytesIO(), frames := film(path), lossless=False)
        width, height = frames[0][0].size
    n = max(1, CELL // width)
    source = base64.b64encode(data.getvalue()).decode()
    kind = "pixels" if n > 1 else "photo"
    size = f'width="{n * width}" height="{n * height}"'
    return f'<img class="{kind}" {size} decoding="sync" alt="{escape(alt)}" src="data:image/webp;base64,{source}">'


def pictures(prompts: Sequence[str], models: Sequence[Model]) -> str:
    """A row a prompt, a column a model."""
    head = "".join(f'<th scope="col">{text}</th>' for text in ("prompt", *(model.label for model in models)))
    rows = ""
    for i, prompt in enumerate(prompts):
        cells = [picture(model.videos[i], f"{model.label}: {prompt}") for model in models]
        rows += f'<tr><th scope="row">{escape(prompt)}</th><td>{"</td><td>".join(cells)}</td></tr>'
    style = f'style="max-width: {(len(models) + 1) * (CELL + GAP)}px"'
    return f'<table class="videos" {style}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def write_report(folder: Path, prompts: Sequence[str]) -> None:
    """report.html from metrics.jsonl, summary.json, config.toml and the videos of the prompts."""
    summary, models = read_run(folder)
    name = escape(folder.resolve().name)
    config = (folder / "config.toml").read_text(encoding="utf-8").strip()
    cost = f"{summary['steps']:,} steps in {clock(summary['seconds'])}, peak memory {summary['peak_mem_gb']:.2f} GB"
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title><link rel="icon" href="data:,"><style>{STYLE}{chart.STYLE}</style></head><body><main>
<header><h1>{name}</h1><p>{cost}</p></header>
<section><h2>Scores</h2>{score_table(models)}</section>
<section><h2>Samples</h2>{pictures(prompts, [m for m in models if len(m.videos) >= len(prompts)])}</section>
<section><h2>Curves</h2>{charts(folder, summary, models)}</section>
<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>
</main></body></html>
"""
    write_atomic(folder / "report.html", page)


def comparison(folder: Path, prompts: Sequence[str], path: Path) -> None:
    """One moving picture: a row a prompt, a column a model, with captions."""
    models = [model for model in read_run(folder)[1] if len(model.videos) >= len(prompts)]
    films = [[film(model.videos[i]) for model in models] for i in range(len(prompts))]
    tick = min([ms for row in films for each in row for _, ms in each if ms] or [1000])
    clips = [[[image for image, ms in each for _ in range(max(1, ms // tick))] for each in row] for row in films]
    width, height = clips[0][0][0].size
    font, small = ImageFont.load_default(14), ImageFont.load_default(13)
    size = (len(models) * (width + GAP) + GAP, len(prompts) * (height + CAPTION + GAP) + CAPTION + GAP)
    draw = ImageDraw.Draw(sheet := Image.new("RGB", size, "white"))
    for column, model in enumerate(models):
        draw.text((GAP + column * (width + GAP), GAP), model.label, INK, font)
    tops = [GAP + CAPTION + row * (height + CAPTION + GAP) for row in range(len(prompts))]
    for top, prompt in zip(tops, prompts, strict=True):
        draw.text((GAP, top + 4), clipped(prompt, small, size[0] - 2 * GAP), FAINT, small)
    frames = []
    for t in range(max(len(clip) for row in clips for clip in row)):
        frame = sheet.copy()
        for top, row in zip(tops, clips, strict=True):
            for column, clip in enumerate(row):
                frame.paste(clip[t % len(clip)], (GAP + column * (width + GAP), top + CAPTION))
        frames.append((frame, tick))
    save(path, frames, lossless=width <= CELL)


def clipped(text: str, font: Any, width: float) -> str:
    """One line of text that fits."""
    line = text = " ".join(text.split())
    while font.getlength(line) > width:
        text = text[:-1].rstrip()
        line = text + "..."
    return line
