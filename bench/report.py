"""Print the results, each op beside its fastest peer: `python -m bench.report [--markdown] [FILE.jsonl ..]`.

Of lines that measure the same the last counts. A peer computes the same function; for the sparse op the
fastest dense attention of the same shape stands in a column of its own.
"""

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HEADER = (
    "device",
    "op",
    "of",
    "shape",
    "dtype",
    "ours",
    "rate",
    "of ceiling",
    "best peer",
    "x peer",
    "x dense",
)
Line = dict[str, Any]


def read(files: list[Path]) -> list[Line]:
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def rows(lines: list[Line]) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, ...], dict[str, Line]] = {}
    for line in lines:
        key = (line["device"], line["op"], line["of"], line["shape"]["name"], line["dtype"])
        groups.setdefault(key, {})[line["variant"]] = line
    table = []
    for key, variants in groups.items():
        ours = next((line for line in variants.values() if line["ours"]), None)
        if ours is None:
            continue
        peer = fastest([line for line in variants.values() if not line["ours"]])
        sparse = key[1] in ("vsa", "vsa_fine")
        dense = fastest(list(groups.get((key[0], "attention", *key[2:]), {}).values())) if sparse else None
        table.append(
            (
                *key,
                duration(ours["p50"]),
                rate(ours),
                share(ours),
                f"{peer['variant']} {duration(peer['p50'])}" if peer else "",
                f"{peer['p50'] / ours['p50']:.3g}" if peer else "",
                f"{dense['p50'] / ours['p50']:.3g}" if dense else "",
            )
        )
    return table


def fastest(lines: list[Line]) -> Line | None:
    return min(lines, key=lambda line: line["p50"], default=None)


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def rate(line: Line) -> str:
    return f"{line['tflops']:.3g} TFLOP/s" if line["tflops"] else f"{line['gb_s']:.4g} GB/s"


def share(line: Line) -> str:
    """Return the share of the matrix products' rate, or of the copy's where the op moves bytes."""
    part = line["of_matmul"] if line["tflops"] else line["of_copy"]
    return "" if part is None else f"{part:.0%}"


def text(table: list[tuple[str, ...]], markdown: bool) -> str:
    if markdown:
        return "\n".join("| " + " | ".join(row) + " |" for row in (HEADER, ("---",) * len(HEADER), *table))
    widths = [max(len(row[i]) for row in (HEADER, *table)) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (HEADER, *table)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*", help="default: all of bench/results")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    known = sorted(p for p in (HERE / "results").glob("*.jsonl") if p.stem not in ("proof", "step"))
    files = arguments.files or known
    print(text(rows(read(files)), arguments.markdown))


if __name__ == "__main__":
    main()
