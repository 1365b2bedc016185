"""Compile the graphs of a run into inductor's cache before it starts, by a cycle of it with random weights.

The steps taken are the run's own, by the loop's own code: those of a cycle at each sparsity, and the first
that leaves a rollout at each of its exits. Blocks of a kind share their graphs, so a few are enough in mode
"blocks". Nothing is read but config.json, and nothing is written but the cache. A sparse student's gates are
taken for zeros, as published folders have none.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from fastdmd.capture import cached, mode_on, notice
from fastdmd.config import Config
from fastdmd.device import pick_device
from fastdmd.log import Progress
from fastdmd.methods.method import cycle
from fastdmd.plan.estimate import depths_of
from fastdmd.plan.preflight import gpu_of, settled
from fastdmd.rng import Rng
from fastdmd.run import Run, build_synthetic, set_sparsity
from fastdmd.train import take_step
from fastdmd.warm import MetaRng, warm_kernels

DEPTH = 3  # of the blocks that are alike: the first has a graph of its own, as its input asks for no gradient
SEARCHED = 64  # cycles in which all exits are met: of four, one is missed in 1e-8 of all runs
TEACHER_STEPS = 2  # of many that are alike
QUICK = 2.0  # seconds without a sign


class Choices(MetaRng):
    """Draws on the meta device that remember what was chosen for all samples: where a rollout is left."""

    def __init__(self, config: Config, step: int, stream: str) -> None:
        super().__init__(config.run.seed, step, stream, range(config.run.batch_size), "cpu")
        self.chosen: list[int] = []

    def shared_integer(self, high: int) -> int:
        self.chosen.append(super().shared_integer(high))
        return self.chosen[-1]


def warm(config: Config, target: str | None) -> Iterator[str]:
    """Compile what a run needs, and yield a line for each cache.

    target: of another machine's GPU, whose kernels alone are compiled; None: the device at hand.
    """
    if target is not None:
        yield warm_kernels(config, target)
        return
    device = pick_device(config.run.device)
    compiles = mode_on(config.compile, device) != "off"
    if device.type == "cuda" or not compiles:
        yield warm_kernels(config, target)
    if compiles:
        yield warm_graphs(config, device)


def warm_graphs(config: Config, device: torch.device) -> str:
    """Compile the graphs of a run for a device, and return what was done."""
    print(notice(config.compile, device), file=sys.stderr)
    if device.type == "cuda":
        _, gpu = gpu_of(device)
        config, _ = settled(config, gpu)
    before = cached()
    with tempfile.TemporaryDirectory() as folder:
        meet_graphs(replace(config, run=replace(config.run, output_dir=folder)))
    new = cached() - before
    line = f"{device.type}: {new['miss']} graphs compiled, {new['hit']} were in the cache"
    return f"{line}, {new['bypass']} cannot be kept" if new["bypass"] else line


def meet_graphs(config: Config) -> None:
    """Take the steps and samples of a run in which all its graphs are made."""
    depths = None
    if config.compile.mode == "blocks":
        full = depths_of(config)
        depths = None if full is None else dict.fromkeys(full, DEPTH)
        config = replace(config, run=replace(config.run, grad_accum=1))  # a block does not know of it
    run = build_synthetic(config, depths)
    steps = needed_steps(config)
    with Progress("warming step", len(steps)) as progress:
        for number, step in enumerate(steps, 1):
            sample(run, step)
            take_step(run)
            if time.monotonic() - progress.start > QUICK:
                progress.show(number)
    sample(run, config.run.max_steps)


def needed_steps(config: Config) -> list[int]:
    """Return the steps of a run that meet all its graphs."""
    method, shape = config.make_method(), config.latent_shape()
    length = len(cycle(method))
    steps: list[int] = []
    for first, end in levels(config):
        met: set[tuple[str, int, int]] = set()
        for step in range(first, min(end, first + SEARCHED * length)):
            carry, found = {}, set()
            for index, phase in enumerate(method.phases(step)):
                rng = Choices(config, step, f"{phase}{index}")
                method.draw(phase, rng, shape, carry)
                found |= {(phase, place, value) for place, value in enumerate(rng.chosen)}
            if step < first + length or not found <= met:
                steps.append(step)
            met |= found
    return steps


def levels(config: Config) -> Iterator[tuple[int, int]]:
    """Yield the ranges of steps in which sparse attention keeps the same share."""
    last = config.run.max_steps
    every = (config.vsa.warmup_every or last) if config.vsa else last
    start = 0
    for step in range(every, last, every):
        assert config.vsa is not None
        if config.vsa.sparsity_at(step) != config.vsa.sparsity_at(start):
            yield start, step
            start = step
    yield start, last


@torch.no_grad()
def sample(run: Run, step: int) -> None:
    """Sample as a validation before a step does; in mode "step" samplers are not compiled."""
    run.step = step
    set_sparsity(run)
    if run.capture.mode != "blocks":
        return
    settings, world = run.config.validation, run.world
    steps = min(settings.teacher_steps, TEACHER_STEPS)
    every = run.method.samplers(steps, settings.teacher_guidance)
    batches = range(0, settings.samples, settings.batch_size)
    sizes = {min(settings.batch_size, settings.samples - first) for first in batches}
    for who, sampler in every.items():
        for size in sizes if who == "student" or settings.teacher_reference else ():
            rng = Rng(settings.seed, 0, "sample", range(size), run.device)
            noise = rng.normal(world.latent_shape)
            cond, uncond = (world.cond([text] * size) for text in (world.prompts[0], world.negative_prompt))
            sampler.run(run.nets, noise, cond, uncond, rng)
