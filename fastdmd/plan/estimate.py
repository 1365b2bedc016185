"""A plan of a run: the peak of its memory, its work and its time, from traces of a few blocks.

Blocks of a network are alike, so bytes and work are linear in their number from the second on: traces of 2, 3
and 4 blocks give those of all, exactly; networks of other depths grow apart. Where a network has fewer, or
heads sit on blocks by number, all blocks are traced.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch

from fastdmd.config import Config
from fastdmd.log import Progress
from fastdmd.methods.method import Phases, cycle
from fastdmd.models.net import Architecture
from fastdmd.plan.gpus import GPU
from fastdmd.plan.live import Phase
from fastdmd.plan.step import Depths, Trace, trace
from fastdmd.plan.validation import of_validations
from fastdmd.plan.work import Work
from fastdmd.roles import Role, read_architecture, roles_of

LEAST, MOST = 2, 4  # blocks of a trace
MARGIN = 1.05  # for fragments of the allocator
RESERVE = 1_500_000_000  # bytes, for CUDA's context and libraries
DEEPEST = 1000
VALIDATION = "validation"
# what compiled blocks move of the bytes of eager ones beside products and attention: `python -m bench.block`
COMPILED = {"compute": 0.29, "float8": 0.2, "mxfp8": 0.2}
QUICK = 2.0  # seconds without a sign


@dataclass(frozen=True)
class PhasePlan:
    """A phase of a step at the peak of its memory, and its work for one micro-batch."""

    peak: int
    by: Mapping[str, int]  # bytes by "kind, role" at the peak
    work: Work
    recomputed: Work


@dataclass(frozen=True)
class Plan:
    """What a run takes."""

    phases: Mapping[str, PhasePlan]  # by "STEP: phase, part", and "validation: sampler"
    cycle: Sequence[Phases]
    peak: int
    peak_phase: str
    by: Mapping[str, int]
    work: Work  # of a cycle
    recomputed: Work
    validation: Work  # of the whole run
    parameters: Mapping[str, int]
    trained: Mapping[str, int]
    checkpoint: int  # bytes

    @property
    def need(self) -> int:
        """Return the bytes that a device must have."""
        return round(self.peak * MARGIN) + RESERVE

    def fits(self, gpu: GPU) -> bool:
        return self.need <= gpu.memory

    def seconds(self, gpu: GPU) -> float:
        """Return the time of a cycle."""
        return sum(gpu.seconds(self.work).values())


def full_depth(architecture: Architecture) -> int:
    """Return how many blocks that are alike an architecture has."""
    return next(n for n in range(1, DEEPEST) if architecture.shallow(n) == architecture)


def depths_of(config: Config) -> Depths | None:
    """Return the blocks of each role's network; None where heads sit on blocks that would be left out."""
    roles = roles_of(config)
    networks = {name: role for name, role in roles.items() if role.how != "heads"}
    if len(networks) < len(roles) and heads_count(config, next(iter(networks.values()))):
        return None
    return {name: full_depth(read_architecture(config, role)) for name, role in networks.items()}


def heads_count(config: Config, role: Role) -> bool:
    """Return whether the blocks that a discriminator's heads sit on are those that are left out."""
    architecture = read_architecture(config, role)
    with torch.device("meta"):
        few = [config.family.make(architecture.shallow(n), role.options) for n in (LEAST, MOST)]
    return len(few[0].widths) != len(few[1].widths)


def make_plan(config: Config, check: bool = True) -> Plan:
    """Plan a run; nothing is loaded but shapes. check: as of `traces`."""
    depths = depths_of(config)
    found = traces(config, depths, progress_of(depths, check), check)
    phases = {
        name: PhasePlan(phase.peak, phase.by, phase.work, phase.recomputed)
        for name, phase in [*found.phases.items(), *of_samplers(found)]
    }
    for name, first in found.first_exit.items():
        # work is linear in the exit step, so the mean is that of both ends
        phases[name] = replace(phases[name], work=(phases[name].work + first) * 0.5)
    if config.compile.mode != "off":
        share = COMPILED[config.precision.linear]
        phases = {
            name: phase if name.endswith("optimizer") else fused(phase, share)
            for name, phase in phases.items()
        }
    peaks = peaks_of(config, phases)
    where = max(peaks, key=lambda name: peaks[name])
    by = Counter(phases[where].by)
    by["inputs"] += others_of(config, where) * by["inputs"]
    steps = cycle(config.make_method())
    return Plan(
        phases=phases,
        cycle=steps,
        peak=peaks[where],
        peak_phase=where,
        by=by,
        work=of_cycle(config, steps, phases, lambda phase: phase.work),
        recomputed=of_cycle(config, steps, phases, lambda phase: phase.recomputed),
        validation=of_validations(
            config, {who: phases[f"{VALIDATION}: {who}"].work for who in found.samplers}
        ),
        parameters=found.parameters,
        trained=found.trained,
        checkpoint=checkpoint_bytes(config, found),
    )


def fused(phase: PhasePlan, share: float) -> PhasePlan:
    """Return a phase in which compiled code moves a share of the bytes."""
    work = replace(phase.work, traffic=share * phase.work.traffic)
    recomputed = replace(phase.recomputed, traffic=share * phase.recomputed.traffic)
    return replace(phase, work=work, recomputed=recomputed)


def peaks_of(config: Config, phases: Mapping[str, PhasePlan]) -> dict[str, int]:
    """Return each phase's peak with what all micro-batches of a step share, as they are made before it."""
    return {
        name: phase.peak + others_of(config, name) * phase.by.get("inputs", 0)
        for name, phase in phases.items()
    }


def others_of(config: Config, phase: str) -> int:
    """Return how many further micro-batches are there in a phase."""
    return 0 if phase.startswith(VALIDATION) else config.run.grad_accum - 1


def of_samplers(found: Trace) -> Iterator[tuple[str, Phase]]:
    """Yield the phases of a validation by name."""
    for who, phase in found.samplers.items():
        yield f"{VALIDATION}: {who}", phase


def of_cycle(
    config: Config,
    steps: Sequence[Phases],
    phases: Mapping[str, PhasePlan],
    part: Callable[[PhasePlan], Work],
) -> Work:
    """Return the work of all steps of a cycle, with all their micro-batches."""
    counts = Counter(" + ".join(step) for step in steps)
    work = Work()
    for name, phase in phases.items():
        times = counts[name.partition(":")[0]]
        if not name.endswith("optimizer"):
            times *= config.run.grad_accum
        work += part(phase) * times
    return work


def checkpoint_bytes(config: Config, found: Trace) -> int:
    """Return the bytes of a checkpoint: masters, two moments, and the student's average in float32."""
    masters = (4 if config.precision.master == "fp32" else 2) * sum(found.trained.values())
    average = 4 * found.trained["student"] if config.ema else 0
    return masters + average + sum(found.moments.values())


def progress_of(depths: Depths | None, check: bool) -> Callable[[], None]:
    """Return what counts a plan's traces and shows them with an ETA, from two seconds on."""
    few = depths is not None and min(depths.values()) > MOST
    total = 1 + int(check) + len(set(depths.values())) if depths and few else 1
    progress, numbers = Progress("planning", total), count(1)

    def done() -> None:
        number = min(next(numbers), total)  # one more where the line was none
        if time.monotonic() - progress.start > QUICK:
            progress.show(number)

    return done


def traces(
    config: Config, depths: Depths | None, done: Callable[[], None] = lambda: None, check: bool = True
) -> Trace:
    """Return the trace of all blocks, from those of a few where that is exact.

    Networks of one depth grow together, by a block; those of another one apart.

    Args: depths, of `depths_of`; check, whether to trace four blocks too, and all where those are no line.
    """
    if depths is None or min(depths.values()) <= MOST:
        return counted(trace(config, None), done)
    base = counted(trace(config, dict.fromkeys(depths, LEAST)), done)
    kinds = sorted(set(depths.values()))
    more: dict[int, Trace] = {}
    for depth in kinds:
        blocks = {name: LEAST + int(n == depth) for name, n in depths.items()}
        more[depth] = counted(trace(config, blocks), done)
    whole = extended(base, more, {depth: depth - LEAST for depth in kinds})
    if not check:
        return whole
    further = counted(trace(config, dict.fromkeys(depths, MOST), peaks_only=True), done)
    guess = extended(base, more, dict.fromkeys(kinds, MOST - LEAST))
    if any(phase.peak != guess.phases[name].peak for name, phase in further.phases.items()):
        return trace(config, None)
    return whole


def counted(found: Trace, done: Callable[[], None]) -> Trace:
    """Return a trace, after counting it."""
    done()
    return found


def extended(base: Trace, more: Mapping[int, Trace], blocks: Mapping[int, int]) -> Trace:
    """Return the trace of more blocks than `base` has.

    more: by kind of network, with one block more of it; blocks: how many more there are.
    """

    def line(part: Callable[[Trace], Any]) -> Any:
        start = part(base)
        total = start
        for kind, one in more.items():
            total += (part(one) - start) * blocks[kind]
        return total

    def each(part: Callable[[Trace], Mapping[str, int]]) -> dict[str, int]:
        keys = dict.fromkeys(key for one in (base, *more.values()) for key in part(one))
        return {key: line(lambda one, key=key: part(one).get(key, 0)) for key in keys}

    def phases(part: Callable[[Trace], Mapping[str, Phase]]) -> dict[str, Phase]:
        return {
            name: Phase(
                line(lambda one, name=name: part(one)[name].peak),
                Counter(each(lambda one, name=name: part(one)[name].by)),
                line(lambda one, name=name: part(one)[name].work),
                line(lambda one, name=name: part(one)[name].recomputed),
            )
            for name in part(base)
        }

    return Trace(
        phases=phases(lambda one: one.phases),
        fixed=each(lambda one: one.fixed),
        parameters=each(lambda one: one.parameters),
        trained=each(lambda one: one.trained),
        moments=each(lambda one: one.moments),
        first_exit={name: line(lambda one, name=name: one.first_exit[name]) for name in base.first_exit},
        samplers=phases(lambda one: one.samplers),
    )
