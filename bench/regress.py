"""Hold what this code does against a stored baseline: `python -m bench.regress`; exit 1 with a table.

Counts (launches and bytes of a block, network calls, host reads, graphs, planned peaks, registers of kernels)
have to be equal exactly, on any machine: fewer too is a change, and asks for a new baseline. What depends on
the version of torch or triton is held to a baseline of that version; the table says where there is none.

`--times` is another check: ops beside reference workloads in one run (`ratios.py`), on this CPU or GPU, which
needs a baseline of the same model. An op is slower where it is more than 5 % above it three times in a row.
"""

import argparse
import json
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest_benchmark
import torch
from pytest_benchmark.stats import Stats
from pytest_benchmark.utils import parse_compare_fail

from bench import counts, ratios, record
from bench.counts import Part

RESULTS = Path(__file__).parent / "results"
BASELINE = RESULTS / "regress.json"
STORE = "python -m bench.regress --store"
SLOWER = parse_compare_fail("median:5%")
TRIES = 3
HEADER = ("", "baseline", "here", "change")


@dataclass(frozen=True)
class Row:
    """A line of the table, and whether it is a failure."""

    name: str
    before: str
    now: str
    said: str
    fails: bool = True


def measure(parts: Mapping[str, Part]) -> list[dict[str, Any]]:
    """Count all parts; return pytest-benchmark's entries, whose one round is the time that counting took."""
    entries: list[dict[str, Any]] = []
    for name, part in parts.items():
        start = time.process_time()
        found = dict(part.count())
        seconds = time.process_time() - start
        print(f"{name}: {len(found)} counts in {seconds:.1f} s", file=sys.stderr, flush=True)
        entries.append(entry(name, [seconds], {"version": part.version, "counts": found}))
    return entries


def entry(name: str, rounds: Sequence[float], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return a benchmark in the form of pytest-benchmark's JSON."""
    stats = Stats()
    for each in rounds:
        stats.update(each)
    return {
        "group": None,
        "name": name,
        "fullname": f"bench/regress.py::{name}",
        "params": None,
        "param": None,
        "extra_info": dict(extra),
        "options": {},
        "stats": stats.as_dict() | {"iterations": 1},
    }


def compare(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return a row for each count that is not the baseline's, and for each that has none to compare with."""
    known = {each["name"]: each for each in before}
    rows: list[Row] = []
    for each in now:
        name, extra = each["name"], each["extra_info"]
        if name not in known:
            rows.append(Row(name, "-", extra["version"] or "", f"no baseline; store one: {STORE}"))
            continue
        base = known[name]["extra_info"]
        if base["version"] != extra["version"]:
            rows.append(Row(name, base["version"], extra["version"], "not comparable", fails=False))
            continue
        rows += differences(name, base["counts"], extra["counts"])
    return rows + gone(known.keys() - {each["name"] for each in now}, STORE)


def gone(names: Collection[str], command: str) -> list[Row]:
    """Return a row for each name that the baseline alone has."""
    return [Row(name, "-", "-", f"not measured any more; store: {command}") for name in sorted(names)]


def differences(part: str, before: Mapping[str, float], now: Mapping[str, float]) -> list[Row]:
    """Return a row for each number that changed, came or went."""
    rows: list[Row] = []
    for key in dict.fromkeys((*before, *now)):
        a, b = before.get(key), now.get(key)
        if a == b:
            continue
        name, shown = f"{part}, {key}", tuple("-" if x is None else number(x) for x in (a, b))
        if a is None or b is None:
            said = f"{'new' if a is None else 'gone'}; store: {STORE}"
        elif b > a:
            said = f"WORSE by {b / a - 1:.2%}" if a else "WORSE"
        else:
            said = f"better by {1 - b / a:.2%}; store: {STORE}"
        rows.append(Row(name, *shown, said))
    return rows


def number(x: float) -> str:
    return f"{x:,}" if isinstance(x, int) else f"{x:,.3f}"


def table(rows: Sequence[Row]) -> str:
    cells = [HEADER, *((row.name, row.before, row.now, row.said) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in cells
    )


def read(path: Path) -> list[dict[str, Any]]:
    """Return the benchmarks of a file; none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8"))["benchmarks"] if path.is_file() else []


def times_file(device: torch.device) -> Path:
    """Return the baseline of a model of GPU or CPU."""
    return RESULTS / f"times-{Path(record.file_name(device)).stem}.json"


def measure_times(device: torch.device, tries: int) -> list[dict[str, Any]]:
    """Return an entry for each op, of the median of its ratios from several tries."""
    version = f"torch {torch.__version__.split('+')[0]}"
    found: dict[str, list[float]] = {name: [] for name in ratios.PAIRS}
    for _ in range(tries):
        for name, each in ratios.measure(device, tuple(found)).items():
            found[name] += each
    return [entry(name, each, {"version": version}) for name, each in found.items()]


def compare_times(before: Sequence[Mapping[str, Any]], device: torch.device) -> list[Row]:
    """Return a row for each op: measured again where it seems slower, and then the best of all tries."""
    known = {each["name"]: each for each in before}
    rows: list[Row] = []
    for now in measure_times(device, 1):
        name, version = now["name"], now["extra_info"]["version"]
        if name not in known:
            rows.append(
                Row(name, "-", ratio(now), f"no baseline of this machine; store one: {STORE} --times")
            )
            continue
        base = known[name]
        if base["extra_info"]["version"] != version:
            rows.append(Row(name, base["extra_info"]["version"], version, "not comparable", fails=False))
            continue
        best = now
        for _ in range(TRIES - 1):
            if not SLOWER.fails(best["stats"], base["stats"]):
                break
            again = entry(name, ratios.measure(device, [name])[name], now["extra_info"])
            best = min(best, again, key=lambda each: each["stats"]["median"])
        change = best["stats"]["median"] / base["stats"]["median"] - 1
        slower = SLOWER.fails(best["stats"], base["stats"]) is not None
        rows.append(
            Row(name, ratio(base), ratio(best), f"{'SLOWER ' if slower else ''}{change:+.1%}", slower)
        )
    return rows


def ratio(each: Mapping[str, Any]) -> str:
    return f"{each['stats']['median']:.3f}"


def store(path: Path, entries: Sequence[Mapping[str, Any]], device: torch.device) -> None:
    """Write a baseline as pytest-benchmark's JSON."""
    about = record.machine(device)
    whole = {
        "machine_info": {key: about[key] for key in ("device", "versions")},
        "commit_info": {"id": about["commit"], "dirty": about["dirty"]},
        "benchmarks": list(entries),
        "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": pytest_benchmark.__version__,
    }
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"stored {path}")


def report(rows: Sequence[Row], checked: int) -> int:
    """Print what is not as it was of `checked` numbers, and return the exit status."""
    if rows:
        print(table(rows))
    failures = sum(row.fails for row in rows)
    print(
        f"{checked} numbers: " + (f"{failures} not as in the baseline" if failures else "as in the baseline")
    )
    return 1 if failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.regress", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--times", action="store_true", help="the times of ops on this machine, not the counts"
    )
    parser.add_argument("--store", action="store_true", help="write what is found as the new baseline")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.times:
        return times(options.store)
    entries = measure(counts.PARTS)
    if options.store:
        store(BASELINE, entries, torch.device("cpu"))
        return 0
    checked = sum(len(each["extra_info"]["counts"]) for each in entries)
    return report(compare(read(BASELINE), entries), checked)


def times(stores: bool) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = times_file(device)
    if stores:
        store(path, measure_times(device, 2 * TRIES), device)
        return 0
    return report(compare_times(read(path), device), len(ratios.PAIRS))


if __name__ == "__main__":
    sys.exit(main())
