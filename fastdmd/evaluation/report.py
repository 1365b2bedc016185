"""What a run came to: report.html, the scores as text for a terminal, and one moving montage.

The page stands alone and runs nothing: inline CSS and SVG, pictures as data URIs, all text escaped.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from fastdmd.evaluation import chart
from fastdmd.evaluation.film import CELL, GAP, LIMIT, film, save
from fastdmd.evaluation.summary import Model, finite, read_run
from fastdmd.files import write_atomic
from fastdmd.log import clock, read_metrics

COLUMNS = ("model", "steps", "oracle", "sliced Wasserstein")
ORACLE, SWD = "share of videos with everything right", "distance to real videos"
# title, what it shows, {metric: (name of the line, CSS class)}
CHARTS: tuple[tuple[str, str, dict[str, tuple[str, str]]], ...] = (
    ("Oracle", ORACLE, {"valid/oracle": ("student", "student")}),
    ("Sliced Wasserstein", SWD, {"valid/swd": ("student", "student")}),
    (
        "Loss",
        "as each phase minimises it",
        {f"train/loss_{role}": (role, role) for role in ("student", "critic")},
    ),
    (
        "Gradient norm",
        "before clipping",
        {f"train/grad_norm_{role}": (role, role) for role in ("student", "critic")},
    ),
    (
        "Score gap",
        "mean |gradient| on the student's x0, mean |critic - teacher|",
        {"train/dmd_grad_abs": ("gradient", "student"), "train/score_gap": ("gap", "gap")},
    ),
    ("Step time", "seconds", {"perf/step_s": ("step time", "plain")}),
)
STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


def table(folder: Path) -> str:
    """Return the scores and the cost of a run as aligned text."""
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
        rows += (
            f'<tr class="{model.style}"><th scope="row">{first}</th><td>{"</td><td>".join(rest)}</td></tr>'
        )
    note = f"<p>Oracle: {ORACLE}, higher is better. Sliced Wasserstein: {SWD}, lower is better.</p>"
    return f'<table class="scores"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{note}'


def charts(folder: Path, summary: dict[str, Any], models: Sequence[Model]) -> str:
    """Draw metrics.jsonl; the final scores end the student's curves, and the teacher's are levels."""
    *teachers, student = models
    rows = read_metrics(folder / "metrics.jsonl")
    if not any("valid/oracle" in row and row["step"] == summary["steps"] for row in rows):
        rows.append(
            {"step": summary["steps"], **{f"valid/{name}": value for name, value in student.scores.items()}}
        )
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
    caption = "<p>In long curves the logged steps are faint, their median bold.</p>"
    return f'{caption}<div class="charts">{figures}</div>'


def picture(path: Path, alt: str) -> str:
    """Return an <img> with the file in it, reduced if it is large."""
    data = io.BytesIO(path.read_bytes())
    with Image.open(path) as image:
        width, height = image.size
    if width > LIMIT:
        data, frames = io.BytesIO(), film(path)
        save(data, frames, lossless=False)
        width, height = frames[0][0].size
    n = max(1, CELL // width)
    source = base64.b64encode(data.getvalue()).decode()
    kind = "pixels" if n > 1 else "photo"
    size = f'width="{n * width}" height="{n * height}"'
    attributes = f'class="{kind}" {size} decoding="sync" alt="{escape(alt)}"'
    return f'<img {attributes} src="data:image/webp;base64,{source}">'


def pictures(prompts: Sequence[str], models: Sequence[Model]) -> str:
    """Return a table of pictures: one row per prompt, one column per model."""
    head = "".join(f'<th scope="col">{text}</th>' for text in ("prompt", *(model.label for model in models)))
    rows = ""
    for i, prompt in enumerate(prompts):
        cells = [picture(model.videos[i], f"{model.label}: {prompt}") for model in models]
        rows += f'<tr><th scope="row">{escape(prompt)}</th><td>{"</td><td>".join(cells)}</td></tr>'
    style = f'style="max-width: {(len(models) + 1) * (CELL + GAP)}px"'
    return f'<table class="videos" {style}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def write_report(folder: Path, prompts: Sequence[str]) -> None:
    """Write report.html from metrics.jsonl, summary.json, config.toml and the videos of the prompts."""
    summary, models = read_run(folder)
    name = escape(folder.resolve().name)
    config = (folder / "config.toml").read_text(encoding="utf-8").strip()
    memory = f"{summary['peak_mem_gb']:.2f} GB"
    cost = f"{summary['steps']:,} steps in {clock(summary['seconds'])}, peak memory {memory}"
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{viewport}
<title>{name}</title><link rel="icon" href="data:,"><style>\n{STYLE}</style></head><body><main>
<header><h1>{name}</h1><p>{cost}</p></header>
<section><h2>Scores</h2>{score_table(models)}</section>
<section><h2>Samples</h2>{pictures(prompts, [m for m in models if len(m.videos) >= len(prompts)])}</section>
<section><h2>Curves</h2>{charts(folder, summary, models)}</section>
<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>
</main></body></html>
"""
    write_atomic(folder / "report.html", page)
