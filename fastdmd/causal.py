"""Few-step sampling block by block with a key-value cache (CausVid 2412.07772; Self-Forcing 2506.08009, algorithm 1).

Backward simulation and validation both are this walk; they differ in where each block leaves it and whether gradient is
kept there. Times are float64 on the host, descending; latents [B, C, T, H, W] float32.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastdmd.denoiser import Cond, Denoiser
from fastdmd.rng import Rng
from fastdmd.sampler import ode, renoise_steps
from fastdmd.schedule import add_noise


class Exit(NamedTuple):
    """Where a block leaves the student's steps: re-noising steps before, and whether the last call keeps gradient."""

    step: int
    grad: bool = False


def frame_blocks(frames: int, per_block: int, independent_first_frame: bool = False) -> list[slice]:
    """The latent frames of each block: [k, k, ..], or [1, k, k, ..]. ValueError if they do not come out even."""
    first = int(independent_first_frame)
    if frames < 1 or (frames - first) % per_block:
        raise ValueError(
            f"{frames} latent frames are not {'1 + ' * first}a multiple of rollout.frames_per_block = {per_block}"
        )
    starts = [0] * first + list(range(first, frames, per_block))
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], frames], strict=True)]


def renoise_blocks(
    student: Denoiser,
    x: Tensor,
    times: Tensor,
    blocks: Sequence[slice],
    exits: Sequence[Exit],
    context_noise: float,
    cond: Cond,
    rng: Rng,
) -> Tensor:
    """x0 [B, C, T, H, W] from noise x. A block is walked to its exit step, denoised there, and held in the cache at
    time `context_noise` for the blocks after it; nothing reads the last, so it is not held.

    A block's noise is drawn when the walk is there, so that a video does not depend on what comes after.
    """
    B, schedule, cache = len(x), student.schedule, student.net.start_video(x.shape)
    denoise = partial(student.block, cache=cache)
    context_t = torch.full((B,), context_noise, dtype=torch.float64)
    made: list[Tensor] = []
    for frames, (step, grad) in zip(blocks, exits, strict=True):
        with torch.no_grad():
            x_t = renoise_steps(denoise, schedule, x[:, :, frames], times, step, cond, rng)
        with torch.set_grad_enabled(grad):
            x0 = denoise(x_t, times[step].expand(B), cond)
        made.append(x0)
        if len(made) < len(blocks):
            with torch.no_grad():
                context = add_noise(schedule, x0, rng.normal(x0.shape[1:]), context_t)
                denoise(context, context_t, cond, write=True)
    return torch.cat(made, dim=2)


def ode_blocks(student: Denoiser, x: Tensor, grid: Tensor, blocks: Sequence[slice], cond: Cond) -> Tensor:
    """`sampler.ode` block by block: a many-step causal model."""
    cache, made = student.net.start_video(x.shape), []
    denoise = partial(student.block, cache=cache)
    for frames in blocks:
        made.append(ode(denoise, student.schedule, x[:, :, frames], grid, cond))
        if len(made) < len(blocks):
            denoise(made[-1], torch.zeros(len(x), dtype=torch.float64), cond, write=True)
    return torch.cat(made, dim=2)


def sample_blocks(
    student: Denoiser,
    x: Tensor,
    times: Tensor,
    blocks: Sequence[slice],
    context_noise: float,
    cond: Cond,
    rng: Rng,
) -> Tensor:
    """`sampler.renoise` block by block: every block goes through all steps."""
    exits = [Exit(len(times) - 1)] * len(blocks)
    return renoise_blocks(student, x, times, blocks, exits, context_noise, cond, rng)
