"""Few-step sampling block by block with a key-value cache (CausVid 2412.07772; Self-Forcing 2506.08009).

It is algorithm 1 of Self-Forcing. Backward simulation and validation both are this walk; they differ in where
each block leaves it and whether gradient is kept there. Times are float64 on the host, descending; latents
[B, C, T, H, W] float32.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastdmd.batch import Cond
from fastdmd.denoiser import Denoiser
from fastdmd.rng import Rng
from fastdmd.sampler import ode_step, renoise_steps, walk
from fastdmd.schedule import Coeffs, add_noise


class BlockNoise(NamedTuple):
    """What is drawn for one block of frames."""

    eps: list[Tensor]  # of each re-noising step, [B, C, k, H, W]
    context: Tensor | None  # of the context pass; None for the last block, which nothing reads


class Walk(NamedTuple):
    """One block's way down the student's steps, and how it is held for the blocks after it."""

    steps: Sequence[Coeffs]  # to the step where it is left
    noise: BlockNoise
    grad: bool = False  # whether the last call keeps gradient


def frame_blocks(frames: int, per_block: int, independent_first_frame: bool = False) -> list[slice]:
    """Return the latent frames of each block: [k, k, ..], or [1, k, k, ..].

    Raise ValueError if the frames do not divide into blocks.
    """
    first = 1 if independent_first_frame else 0
    if frames < 1 or (frames - first) % per_block:
        multiple = "1 + a multiple" if independent_first_frame else "a multiple"
        raise ValueError(
            f"{frames} latent frames are not {multiple} of rollout.frames_per_block = {per_block}"
        )
    starts = [0] * first + list(range(first, frames, per_block))
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], frames], strict=True)]


def draw_blocks(
    rng: Rng, blocks: Sequence[slice], steps: Sequence[int], shape: Sequence[int]
) -> list[BlockNoise]:
    """Return the noise of blocks that take these numbers of re-noising steps, of latents [C, T, H, W].

    It is drawn block by block, so that a video does not depend on what comes after.
    """
    C, _, H, W = shape
    drawn = []
    for index, (frames, n) in enumerate(zip(blocks, steps, strict=True)):
        size = (C, frames.stop - frames.start, H, W)
        eps = [rng.normal(size) for _ in range(n)]
        drawn.append(BlockNoise(eps, rng.normal(size) if index + 1 < len(blocks) else None))
    return drawn


def renoise_blocks(
    student: Denoiser, x: Tensor, blocks: Sequence[slice], walks: Sequence[Walk], context: Coeffs, cond: Cond
) -> Tensor:
    """Return x0 [B, C, T, H, W] from noise x.

    A block is walked to its last step, denoised there, and held in the cache at the time of `context` for the
    blocks after it; nothing reads the last, so it is not held.
    """
    denoise = partial(student.block, cache=student.net.start_video(x.shape))
    done: list[Tensor] = []
    for frames, (steps, noise, grad) in zip(blocks, walks, strict=True):
        with torch.no_grad():
            x_t = renoise_steps(denoise, x[:, :, frames], steps, noise.eps, cond)
        with torch.set_grad_enabled(grad):
            x0 = denoise(x_t, steps[-1], cond)
        done.append(x0)
        if noise.context is not None:
            with torch.no_grad():
                denoise(add_noise(x0, noise.context, context), context, cond, write=True)
    return torch.cat(done, dim=2)


def ode_blocks(student: Denoiser, x: Tensor, grid: Tensor, blocks: Sequence[slice], cond: Cond) -> Tensor:
    """Return x0 by `sampler.ode` block by block: a many-step causal model."""
    denoise = partial(student.block, cache=student.net.start_video(x.shape))
    clean = torch.zeros(1, dtype=torch.float64)
    *steps, context = walk(student.schedule, torch.cat([grid, clean]), x)
    done: list[Tensor] = []
    for frames in blocks:
        x_t = x[:, :, frames]
        for now, then in pairwise(steps):
            x_t = ode_step(x_t, denoise(x_t, now, cond), now, then)
        done.append(x_t)
        if len(done) < len(blocks):
            denoise(x_t, context, cond, write=True)
    return torch.cat(done, dim=2)


def sample_blocks(
    student: Denoiser,
    x: Tensor,
    times: Tensor,
    blocks: Sequence[slice],
    context_noise: float,
    cond: Cond,
    rng: Rng,
) -> Tensor:
    """Return x0 by `sampler.renoise` block by block: every block goes through all steps."""
    context_time = torch.tensor([context_noise], dtype=torch.float64)
    *steps, context = walk(student.schedule, torch.cat([times, context_time]), x)
    noise = draw_blocks(rng, blocks, [len(times) - 1] * len(blocks), x.shape[1:])
    walks = [Walk(steps, each) for each in noise]
    return renoise_blocks(student, x, blocks, walks, context, cond)
