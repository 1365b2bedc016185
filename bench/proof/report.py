"""What bench.proof found, as a table and as a picture."""

import json
from html import escape
from pathlib import Path
from typing import Any

from bench.record import REPOSITORY

RESULTS = REPOSITORY / "bench" / "results"
WHO = {
    "teacher": "teacher, 50 steps",
    "teacher_few": "teacher, as few",
    "start": "student, untrained",  # what its sampler alone is worth: not that of the teacher
    "student": "student",
}
ORDER = (
    "dmd",
    "sid",
    "lcm",
    "dmd_gan",
    "dmd_lora",
    "dcm_semantic",
    "dcm_detail",
    "selfforcing_dmd",
    "selfforcing_sid",
    "sdxl_lcm",
    "sdxl_lcm_lora",
)
# what is asked of a student
LEAST_GAIN = 0.25
LEAST_SHARE = 0.85
LEAST_SHARE_OF_SCORES = 0.92  # of DMD and SiD
Line = dict[str, Any]


def newest(results: Path) -> list[Line]:
    """Return the last line of each configuration, in the order of ORDER."""
    path = results / "proof.jsonl"
    lines = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )
    last = {line["config"].removeprefix("tiny_"): line for line in lines}
    return [last[name] for name in ORDER if name in last]


def shortfall(line: Line) -> str | None:
    """Say how a student misses what is asked of it; return None when it does not.

    Asked are LEAST_GAIN over its teacher in as few steps, by the teacher's sampler and by its own, and a
    share of what the teacher has in 50.
    """
    of_50, few, start, student = (line["scores"][who]["oracle"] for who in WHO)
    few = max(few, start)
    share = LEAST_SHARE_OF_SCORES if {"dmd", "sid"} & set(line["config"].split("_")) else LEAST_SHARE
    if student >= max(few + LEAST_GAIN, share * of_50):
        return None
    return f"{line['config']}: {student:.3f}; asked {few:.3f} + {LEAST_GAIN} and {share} x {of_50:.3f}"


def percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def table(lines: list[Line]) -> str:
    """Lay out one row per configuration."""
    rows = [("config", "steps", *(f"{who}: oracle, SWD" for who in WHO.values()), "of teacher", "training")]
    for line in lines:
        scores = line["scores"]
        rows.append(
            (
                line["config"],
                str(line["student_steps"]),
                *(f"{scores[who]['oracle']:.3f}, {scores[who]['swd']:.4f}" for who in WHO),
                percent(scores["student"]["oracle"], scores["teacher"]["oracle"]),
                f"{line['seconds'] / 60:.1f} min",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows
    )


LEFT, RIGHT, TOP, ROW, KEY = 180, 700, 56, 30, 156
STYLE = """text { font: 13px sans-serif; fill: #1c1c1a } .faint { fill: #6d6d68 } .rule { stroke: #dcdcd6 }
.between { stroke: #eab79d; stroke-width: 3 } .teacher { fill: #fff; stroke: #1c1c1a; stroke-width: 1.75 }
.teacher_few { fill: #9a9a94 } .start { fill: none; stroke: #c2410c; stroke-width: 1.75 }
.student { fill: #c2410c }"""


def picture(lines: list[Line]) -> str:
    """Draw the oracle scores as SVG, one row per configuration.

    A bar leads from the student before training to it after.
    """

    def x(score: float) -> float:
        return LEFT + (RIGHT - LEFT) * score

    bottom = TOP + ROW * len(lines)
    parts = [f'<style>{STYLE}</style><rect width="{RIGHT + 50}" height="{bottom + 30}" fill="#fff"/>']
    for i, (who, label) in enumerate(WHO.items()):
        parts.append(f'<circle class="{who}" cx="{LEFT - 80 + KEY * i}" cy="20" r="5.5"/>')
        parts.append(f'<text x="{LEFT - 68 + KEY * i}" y="24.5">{label}</text>')
    for mark in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path class="rule" d="M{x(mark)} {TOP - 14}V{bottom - 8}"/>')
        parts.append(
            f'<text class="faint" text-anchor="middle" x="{x(mark)}" y="{bottom + 10}">{mark:.0%}</text>'
        )
    for i, line in enumerate(lines):
        y, scores = TOP + ROW * i, {who: line["scores"][who]["oracle"] for who in WHO}
        name = escape(f"{line['config'].removeprefix('tiny_')}, {line['student_steps']} steps")
        parts.append(f'<text text-anchor="end" x="{LEFT - 14}" y="{y + 4.5}">{name}</text>')
        parts.append(f'<path class="between" d="M{x(scores["start"])} {y}H{x(scores["student"])}"/>')
        for who, score in scores.items():
            title = f"<title>{WHO[who]}: {score:.1%}</title>"
            parts.append(f'<circle class="{who}" cx="{x(score):.1f}" cy="{y}" r="5.5">{title}</circle>')
    size = f'width="{RIGHT + 50}" height="{bottom + 30}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>\n'
