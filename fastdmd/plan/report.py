"""A plan in words, for a terminal, and as JSON."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdmd.config import Config
from fastdmd.plan.estimate import Plan
from fastdmd.plan.gpus import GPU
from fastdmd.plan.levers import Room

GB = 1e9
LITTLE = 0.0005  # share of a time, below which nothing is gained
BALANCE = (0.5, 5.0)  # of the critic's learning to the student's, outside of which a plan warns


def updates(config: Config, plan: Plan) -> dict[str, float]:
    """Return how often each trained role is updated in the whole run; max_steps counts rollouts."""
    method, counts = config.make_method(), Counter[str]()
    for step in plan.cycle:
        for phase in step:
            counts.update(method.trains(phase))
    return {role: count * config.run.max_steps / len(plan.cycle) for role, count in counts.items()}


def balance(config: Config, plan: Plan) -> float | None:
    """Return k = critic updates per student's update x lr_critic / lr_student; None without a critic."""
    found = updates(config, plan)
    if "critic" not in found or "student" not in found:
        return None
    return found["critic"] / found["student"] * config.optim["critic"].lr / config.optim["student"].lr


def hours(config: Config, plan: Plan, gpu: GPU) -> float:
    """Return the time of the whole training in hours."""
    return plan.seconds(gpu) * config.run.max_steps / len(plan.cycle) / 3600


def validation_hours(plan: Plan, gpu: GPU) -> float:
    """Return the time of all validations in hours, without what encodes and decodes."""
    return sum(gpu.seconds(plan.validation).values()) / 3600


def lines(config: Config, plan: Plan, name: str, gpu: GPU) -> Iterator[str]:
    """Yield the three lines of a plan: memory, time, and what is learned."""
    verdict = "fits" if plan.fits(gpu) else "does NOT fit"
    yield (
        f"memory: peak {plan.peak / GB:.1f} GB in {plan.peak_phase}; with room for fragments and CUDA "
        f"{plan.need / GB:.1f} GB, and {name} has {gpu.memory / GB:.1f}: {verdict}"
    )
    parts = gpu.seconds(plan.work)
    most = max(parts, key=lambda part: parts[part])
    again = plan.recomputed.flops / plan.work.flops if plan.work.flops else 0
    cycle = f"{len(plan.cycle)} step{'s' if len(plan.cycle) > 1 else ''}"
    yield (
        f"time: {plan.seconds(gpu):.3g} s per cycle of {cycle} by derived rates, "
        f"{hours(config, plan, gpu):.3g} hours of training and {validation_hours(plan, gpu):.3g} of "
        f"validation; most of the training {most} ({100 * parts[most] / sum(parts.values()):.0f} %), "
        f"recomputed {100 * again:.0f} % of FLOPs"
    )
    counts = ", ".join(f"{count:.0f} of the {role}" for role, count in updates(config, plan).items())
    yield f"updates: {counts}; a checkpoint has {plan.checkpoint / GB:.3g} GB"


def warnings(config: Config, plan: Plan) -> Iterator[str]:
    """Yield what a run should not start with."""
    k = balance(config, plan)
    low, high = BALANCE
    if k is not None and not low <= k <= high:
        yield (
            f"the critic learns {k:.3g} times as fast as the student (updates x learning rate), outside of "
            f"{low:g} to {high:g}; change critic.updates_per_generator or optim.critic.lr"
        )
    folder = next(
        p for p in (Path(config.run.output_dir), *Path(config.run.output_dir).parents) if p.is_dir()
    )
    free = shutil.disk_usage(folder).free
    kept = plan.checkpoint * (config.checkpoint.keep + 1)
    if kept > free:
        yield (
            f"{config.checkpoint.keep + 1} checkpoints take {kept / GB:.3g} GB, and {folder} has "
            f"{free / GB:.3g} free; lower checkpoint.keep, or name another run.output_dir"
        )


def table(plan: Plan) -> Iterator[str]:
    """Yield the bytes of the peak by what they are for, and each phase's peak."""
    rows = sorted(plan.by.items(), key=lambda row: -row[1])
    width = max(len(kind) for kind, _ in rows)
    for kind, size in rows:
        if size >= plan.peak / 1000:
            yield f"  {kind.ljust(width)}  {size / GB:8.2f} GB"
    yield "phases:"
    width = max(map(len, plan.phases))
    for name, phase in plan.phases.items():
        yield f"  {name.ljust(width)}  {phase.peak / GB:8.2f} GB  {phase.work.flops / 1e12:10.1f} TFLOP"


def room_line(config: Config, room: Room) -> str:
    """Return what a larger micro-batch is worth."""
    if room.batch_size == config.run.batch_size:
        return f"run.batch_size = {room.batch_size} is the largest that fits"
    worth = f"{100 * room.gain:.1f} % less time" if room.gain >= LITTLE else "as long"
    return (
        f"run.batch_size up to {room.batch_size} fits; at {room.batch_size} a sample takes {worth} "
        "by derived rates, which leave out how well small products fill a GPU"
    )


def as_json(config: Config, plan: Plan, name: str, gpu: GPU, room: Room | None = None) -> dict[str, Any]:
    """Return a plan as numbers, sizes in GB (1e9 bytes)."""
    return {
        "gpu": name,
        "peak_gb": plan.peak / GB,
        "need_gb": plan.need / GB,
        "fits": plan.fits(gpu),
        "seconds_per_cycle": plan.seconds(gpu),
        "gpu_hours": hours(config, plan, gpu),
        "validation_hours": validation_hours(plan, gpu),
        "by": {kind: size / GB for kind, size in plan.by.items()},
        "phases": {name: phase.peak / GB for name, phase in plan.phases.items()},
        "updates": updates(config, plan),
        "k": balance(config, plan),
        "checkpoint_gb": plan.checkpoint / GB,
        "parameters": dict(plan.parameters),
        **({"largest_batch": room.batch_size, "largest_batch_gain": room.gain} if room else {}),
    }


def page(config: Config, plan: Plan, name: str, gpu: GPU) -> str:
    """Return the whole plan as text."""
    text = [*lines(config, plan, name, gpu), "at the peak:", *table(plan)]
    return "\n".join([*text, *(f"warning: {line}" for line in warnings(config, plan))])
