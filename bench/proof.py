"""Every method on the tiny worlds, beside its teacher: `python -m bench.proof [CONFIG.toml ..] [--runs FOLDER]`.

Trains each configuration, or goes on with its run; appends its summary.json, its name, versions and commit to
bench/results/proof.jsonl; draws bench/results/proof.svg; prints the table. Of a configuration the last line counts.
"""

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

import torch

from bench.record import REPOSITORY, append, machine
from fastdmd import config as configs
from fastdmd import train as trainer

RESULTS = REPOSITORY / "bench" / "results"
WHO = {"teacher_50": "teacher, 50 steps", "teacher_few": "teacher, as few", "student": "student"}
ORDER = (  # a detail expert starts from the semantic one's export
    "dmd",
    "sid",
    "lcm",
    "dmd_gan",
    "dcm_semantic",
    "dcm_detail",
    "selfforcing_dmd",
    "selfforcing_sid",
    "sdxl_lcm",
    "sdxl_lcm_lora",
)
FEEDS = {"dcm_semantic": "student"}  # exported into this folder of its run
Line = dict[str, Any]


def prove(path: Path, runs: Path | None) -> Line:
    """Train (or finish) one configuration. -> its line."""
    name = path.stem
    overrides = [f'run.output_dir="{runs / name}"'] if runs else []
    config = configs.load(path, overrides)
    folder = Path(config.run.output_dir)
    trainer.train(config)
    if out := FEEDS.get(name.removeprefix("tiny_")):
        trainer.export_student(folder, folder / out)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    here = {**machine(torch.device("cpu")), "command": f"python -m bench.proof configs/{path.name}"}
    return {"config": name, **summary, **here}


def newest(lines: list[Line]) -> list[Line]:
    """The last line of each configuration, in the order of ORDER."""
    last = {line["config"].removeprefix("tiny_"): line for line in lines}
    return [last[name] for name in ORDER if name in last]


def table(lines: list[Line]) -> str:
    rows = [("config", "steps", *(f"{who}: oracle, SWD" for who in WHO.values()), "of teacher", "training")]
    for line in lines:
        scores = line["scores"]
        rows.append(
            (
                line["config"],
                str(line["student_steps"]),
                *(f"{scores[who]['oracle']:.3f}, {scores[who]['swd']:.4f}" for who in WHO),
                f"{scores['student']['oracle'] / scores['teacher_50']['oracle']:.1%}",
                f"{line['seconds'] / 60:.1f} min",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows)


LEFT, RIGHT, TOP, ROW = 170, 620, 56, 30
STYLE = """text { font: 13px sans-serif; fill: #1c1c1a } .faint { fill: #6d6d68 } .rule { stroke: #dcdcd6 }
.between { stroke: #9a9a94; stroke-width: 2 } .teacher_50 { fill: #fff; stroke: #1c1c1a; stroke-width: 1.75 }
.teacher_few { fill: #9a9a94 } .student { fill: #c2410c }"""


def picture(lines: list[Line]) -> str:
    """Oracle score of the three, a row a configuration, as SVG."""

    def x(score: float) -> float:
        return LEFT + (RIGHT - LEFT) * score

    bottom = TOP + ROW * len(lines)
    parts = [f'<style>{STYLE}</style><rect width="{RIGHT + 50}" height="{bottom + 30}" fill="#fff"/>']
    for i, (who, label) in enumerate(WHO.items()):
        parts.append(f'<circle class="{who}" cx="{LEFT + 150 * i}" cy="20" r="5.5"/>')
        parts.append(f'<text x="{LEFT + 150 * i + 12}" y="24.5">{label}</text>')
    for mark in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path class="rule" d="M{x(mark)} {TOP - 14}V{bottom - 8}"/>')
        parts.append(f'<text class="faint" text-anchor="middle" x="{x(mark)}" y="{bottom + 10}">{mark:.0%}</text>')
    for i, line in enumerate(lines):
        y, scores = TOP + ROW * i, {who: line["scores"][who]["oracle"] for who in WHO}
        name = escape(f"{line['config'].removeprefix('tiny_')}, {line['student_steps']} steps")
        parts.append(f'<text text-anchor="end" x="{LEFT - 14}" y="{y + 4.5}">{name}</text>')
        parts.append(f'<path class="between" d="M{x(scores["teacher_few"])} {y}H{x(scores["student"])}"/>')
        for who, score in scores.items():
            told = f"<title>{WHO[who]}: {score:.1%}</title>"
            parts.append(f'<circle class="{who}" cx="{x(score):.1f}" cy="{y}" r="5.5">{told}</circle>')
    size = f'width="{RIGHT + 50}" height="{bottom + 30}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [REPOSITORY / "configs" / f"tiny_{name}.toml" for name in ORDER]
    parser.add_argument("configs", type=Path, nargs="*", default=known, help="default: configs/tiny_*.toml")
    parser.add_argument("--runs", type=Path, help="folder for the runs; default: each configuration's output_dir")
    arguments = parser.parse_args()
    for path in arguments.configs:
        append([RESULTS], "proof.jsonl", prove(path, arguments.runs))
    lines = newest([json.loads(line) for line in (RESULTS / "proof.jsonl").read_text(encoding="utf-8").splitlines()])
    (RESULTS / "proof.svg").write_text(picture(lines), encoding="utf-8")
    print(table(lines))


if __name__ == "__main__":
    main()
