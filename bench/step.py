"""Time a cycle of a run: `python -m bench.step CONFIG [key=value ..] [--against key=value] [--diffusers]`.

Weights and inputs are random, so a folder with config.json is enough. Samples a second, MFU by role, parts of
each phase, launches, the largest kernels, and memory beside the plan's; a line goes to results/step.jsonl.
"""

import argparse
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import record
from bench.meter import BACKWARD, FORWARD, GRAPH, Clock, attach, launches
from bench.side import side_by_side
from fastdmd import config as configs
from fastdmd.config import Config
from fastdmd.device import pick_device
from fastdmd.flops import phase_flops
from fastdmd.hardware import peak_flops, peak_memory_gb
from fastdmd.methods.method import cycle
from fastdmd.plan.estimate import make_plan
from fastdmd.plan.preflight import gpu_of, settled
from fastdmd.run import Run, build_synthetic, set_sparsity
from fastdmd.train import take_step
from fastdmd.warm_graphs import needed_steps

HERE = Path(__file__).parent / "results"
FILE = "step.jsonl"
LARGEST = 10
PAIRS = 14
QUERY = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"


def at(run: Run, step: int) -> None:
    """Bring a run's counter to a step."""
    run.step = step
    set_sparsity(run)


def part_flops(run: Run, steps: Sequence[int]) -> Counter[str]:
    """Return the useful FLOPs of some steps by part: what is computed anew counts once."""
    found: Counter[str] = Counter()
    for step in steps:
        at(run, step)
        for phase, roles in phase_flops(run):
            for role, flops in roles.items():
                if run.capture.mode == "step":
                    found[f"{phase}: {GRAPH}"] += sum(flops)
                else:
                    found[f"{phase}: {FORWARD}, {role}"] += flops.forward
                    found[f"{phase}: {BACKWARD}"] += flops.backward
    return found


def by_role(parts: Mapping[str, float], trains: Any) -> Counter[str]:
    """Return the sum of parts by role: of its calls, and of backwards of phases that train it first."""
    found: Counter[str] = Counter()
    for part, value in parts.items():
        phase, _, what = part.partition(": ")
        if what.startswith(f"{FORWARD}, "):
            found[what.partition(", ")[2]] += value
        elif what in (BACKWARD, GRAPH):
            found[trains(phase)[0]] += value
    return found


def take(run: Run, steps: Sequence[int], clock: Clock | None = None) -> None:
    """Take some steps of a run."""
    for step in steps:
        at(run, step)
        if clock is not None:
            clock.begin("data")
        take_step(run)


def warm_up(run: Run) -> None:
    """Take a cycle, or all steps that compile something."""
    take(run, range(len(cycle(run.method))) if run.capture.mode == "off" else needed_steps(run.config))


def timed(run: Run, cycles: int) -> dict[str, Any]:
    """Return what cycles of a run take, after one to warm up and one under the profiler."""
    length, device = len(cycle(run.method)), run.device
    steps = range(cycles * length)
    flops = part_flops(run, steps)
    warm_up(run)
    counted = launches(lambda: take(run, range(length)), device)
    clock = Clock(device)
    attach(run, clock)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    take(run, steps, clock)
    parts, wall = clock.read()
    seconds, settings = sum(parts.values()), run.config.run
    roles, role_seconds = by_role(flops, run.method.trains), by_role(parts, run.method.trains)
    peak = peak_flops(device, run.config.precision.dtype)
    largest = sorted(counted.items(), key=lambda row: -row[1][1])[:LARGEST]
    return {
        "cycles": cycles,
        "steps": length,
        "batch": settings.batch_size * settings.grad_accum,
        "cycle_s": seconds / cycles,
        "wall_s": wall / cycles,
        "samples_s": cycles * length * settings.batch_size * settings.grad_accum / seconds,
        "parts": {part: value / cycles for part, value in parts.items()},
        "flops": {role: value / cycles for role, value in roles.items()},
        "role_s": {role: value / cycles for role, value in role_seconds.items()},
        "peak_flops": peak,
        "mfu": {role: value / role_seconds[role] / peak for role, value in roles.items()} if peak else None,
        "launches": sum(count for count, _ in counted.values()),
        "largest": [[name, count, seconds] for name, (count, seconds) in largest],
        "peak_memory_gb": peak_memory_gb(device),
        "planned_gb": make_plan(run.config).peak / 1e9,
    }


def by_turns(one: Run, other: Run) -> list[tuple[float, float]]:
    """Return the seconds of a cycle of two runs, pair by pair, after warming both up."""
    pairs = []
    for run in (one, other):
        warm_up(run)
    for _ in range(PAIRS):
        seconds = []
        for run in (one, other):
            clock = Clock(run.device)
            take(run, range(len(cycle(run.method))), clock)
            seconds.append(sum(clock.read()[0].values()))
        pairs.append((seconds[0], seconds[1]))
    return pairs


def clocks() -> str | None:
    """Return the clocks, power and temperature of the GPUs now; None without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def prepared(path: Path, overrides: Sequence[str]) -> tuple[Config, torch.device]:
    """Return a configuration at the sparsity that its run ends at, and its device.

    Guidance is in two calls where a run would have it so.
    """
    config = configs.load(path, overrides, elsewhere=True)
    device = pick_device(config.run.device)
    if config.vsa is not None:
        config = replace(config, vsa=replace(config.vsa, warmup_every=0))
    if device.type == "cuda":
        config, _ = settled(config, gpu_of(device)[1])
    return config, device


def head(machine: Mapping[str, Any], now: str | None) -> Iterator[str]:
    """Yield the first lines: device, versions, commit and clocks."""
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    commit = str(machine["commit"])[:12] + (" with changes" if machine["dirty"] else "")
    yield f"{machine['device']}; {versions}; commit {commit}"
    if now is not None:
        yield f"clocks ({QUERY}): {now}"


def table(found: Mapping[str, Any], clock: str) -> Iterator[str]:
    """Yield the results as text."""
    yield (
        f"{found['cycles']} cycles of {found['steps']} steps of {found['batch']} samples: "
        f"{found['cycle_s']:.4g} s each of {clock}, {found['wall_s']:.4g} by the wall clock, "
        f"{found['samples_s']:.4g} samples/s"
    )
    width = max(map(len, found["parts"]))
    for part, seconds in found["parts"].items():
        yield f"  {part.ljust(width)}  {seconds:10.4g} s  {100 * seconds / found['cycle_s']:5.1f} %"
    peak = found["peak_flops"]
    name = (
        f"of {peak / 1e12:g} TFLOP/s (data sheet, dense bfloat16)"
        if peak
        else "of a device without a known peak"
    )
    yield f"useful work by role, {name}:"
    for role, flops in found["flops"].items():
        seconds = found["role_s"][role]
        rate = f"{flops / seconds / 1e12:.4g} TFLOP/s"
        mfu = f", MFU {100 * found['mfu'][role]:.1f} %" if peak else ""
        yield f"  {role:8}  {flops / 1e12:10.4g} TFLOP in {seconds:.4g} s: {rate}{mfu}"
    yield f"peak memory {found['peak_memory_gb']:.3g} GB of {clock}, planned {found['planned_gb']:.3g}"
    yield f"{found['launches']} launches a cycle; the largest:"
    for name, count, seconds in found["largest"]:
        yield f"  {count:7}  {seconds:10.4g} s  {name[:80]}"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.path=value, values in TOML syntax")
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--diffusers", action="store_true", help="time diffusers' network beside ours too")
    parser.add_argument(
        "--against", action="append", metavar="KEY=VALUE", help="time by turns with the key changed"
    )
    parser.add_argument(
        "--results", type=Path, action="append", help=f"folders of {FILE}; default {HERE.name}/"
    )
    arguments = parser.parse_intermixed_args(words)
    try:
        config, device = prepared(arguments.config, arguments.overrides)
        machine = record.machine(device, "bench.step")
        print(*head(machine, clocks() if device.type == "cuda" else None), sep="\n", flush=True)
        found = timed(build_synthetic(config), arguments.cycles)
        found["clocks"] = clocks() if device.type == "cuda" else None  # under load
        print(*table(found, "the device" if device.type == "cuda" else "the process"), sep="\n", flush=True)
        if arguments.against:
            changed, _ = prepared(arguments.config, [*arguments.overrides, *arguments.against])
            found["against"] = arguments.against
            found["pairs"] = by_turns(build_synthetic(config), build_synthetic(changed))
            ratio = median(one / other for one, other in found["pairs"])
            print(
                f"{' '.join(arguments.against)}: {ratio:.4g} x as fast, median of {PAIRS} pairs", flush=True
            )
        if arguments.diffusers:
            found["diffusers"] = side_by_side(config, device)
            for of, (ours, theirs) in found["diffusers"].items():
                print(f"{of}: ours {ours:.4g} s, diffusers {theirs:.4g} s, {theirs / ours:.3g} x")
    except ValueError as e:
        parser.error(str(e))
    line = {"op": "step", "config": arguments.config.stem, "overrides": arguments.overrides, **found}
    record.append(arguments.results or [HERE], FILE, line | machine)


if __name__ == "__main__":
    main()
