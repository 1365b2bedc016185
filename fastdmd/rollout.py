"""Backward simulation: the student's own few steps, up to a random exit (DMD2 2405.14867, section 4.5), of whole videos
or of one block of frames after the other (self-forcing, 2506.08009).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastdmd.causal import Exit, frame_blocks, renoise_blocks
from fastdmd.denoiser import Batch, Denoiser
from fastdmd.rng import Rng
from fastdmd.sampler import renoise_steps
from fastdmd.schedule import add_noise

BLOCK_KEYS = ("frames_per_block", "independent_first_frame", "shared_exit_step", "context_noise")


@dataclass(frozen=True, kw_only=True)
class Config:
    mode: Literal["bidirectional", "causal", "data"] = "bidirectional"
    exit: Literal["uniform", "last"] = "uniform"
    # latent frames at the end that carry the loss; absent: all. Causal blocks wholly before them keep no gradient
    grad_frames: int | None = None
    frames_per_block: int | None = None  # latent frames; this key and those below: mode = "causal" only
    independent_first_frame: bool = False  # a block of its own before the others
    shared_exit_step: bool = True  # one exit for all blocks of a video, else one for each
    context_noise: float = 0.0  # time in [0, 1) at which clean blocks are shown to those after them

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.grad_frames is not None and self.grad_frames < 1:
            yield "grad_frames", f"{self.grad_frames} is not positive; leave it out to use all frames"
        if self.frames_per_block is not None and self.frames_per_block < 1:
            yield "frames_per_block", f"{self.frames_per_block} is not positive; Self-Forcing uses 3"
        if not 0 <= self.context_noise < 1:
            yield "context_noise", f"{self.context_noise} leaves [0, 1); Self-Forcing uses 0"
        if self.mode == "causal":
            if self.frames_per_block is None:
                yield "frames_per_block", "missing; mode = 'causal' needs it, and Self-Forcing uses 3"
            return
        for key in fields(self):
            if key.name in BLOCK_KEYS and getattr(self, key.name) != key.default:
                yield key.name, "only mode = 'causal' has blocks; remove the key"

    def blocks(self, frames: int) -> list[slice]:
        """The blocks of a causal rollout of that many latent frames."""
        assert self.frames_per_block is not None  # `problems` asks for it
        return frame_blocks(frames, self.frames_per_block, self.independent_first_frame)


class Rollout(NamedTuple):
    """Where blocks exit at different steps, exit_t is the largest and next_t the smallest of theirs: all frames share
    one score time, so its window has to hold that of each block."""

    x0_g: Tensor  # student output at the exit step, float32 [B, C, ..]
    exit_t: float  # the exit step's time
    next_t: float  # the next step's time, 0 after the last

    def detach(self) -> "Rollout":
        return self._replace(x0_g=self.x0_g.detach())


def rollout(student: Denoiser, batch: Batch, times: Tensor, config: Config, rng: Rng, grad: bool) -> Rollout:
    """Draw the exit step e, the same on all ranks; walk steps 0 .. e - 1 without gradient; denoise once at e.

    Steps past e never run. Gradient, if any, only through the exit step. Mode "causal" does so for each block of
    frames. Mode "data" noises a data latent to the exit time in place of the walk. times: float64 [n] descending.
    """
    if config.mode == "causal":
        return _causal(student, batch, times, config, rng, grad)
    B, schedule = len(batch.cond.text), student.schedule
    e = _exit_step(times, config, rng)
    t = times[e].expand(B)
    with torch.no_grad():
        eps = rng.normal(batch.latent_shape)
        if config.mode == "data":
            if batch.x0 is None:
                raise ValueError("rollout.mode = 'data' needs data with latents; use 'bidirectional'")
            x_t = add_noise(schedule, batch.x0, eps, t)
        else:
            x_t = renoise_steps(student, schedule, eps, times, e, batch.cond, rng)
    with torch.set_grad_enabled(grad):
        x0_g = student(x_t, t, batch.cond)
    return Rollout(x0_g, *_window(times, [e]))


def _causal(student: Denoiser, batch: Batch, times: Tensor, config: Config, rng: Rng, grad: bool) -> Rollout:
    T = batch.latent_shape[1]
    blocks = config.blocks(T)
    draws = 1 if config.shared_exit_step else len(blocks)
    steps = [_exit_step(times, config, rng) for _ in range(draws)] * (len(blocks) // draws)
    first = T - (config.grad_frames or T)  # of the frames that carry the loss
    exits = [Exit(e, grad and frames.stop > first) for e, frames in zip(steps, blocks, strict=True)]
    noise = rng.normal(batch.latent_shape)
    x0_g = renoise_blocks(student, noise, times, blocks, exits, config.context_noise, batch.cond, rng)
    return Rollout(x0_g, *_window(times, steps))


def _exit_step(times: Tensor, config: Config, rng: Rng) -> int:
    return len(times) - 1 if config.exit == "last" else rng.shared_integer(len(times))


def _window(times: Tensor, steps: Sequence[int]) -> tuple[float, float]:
    """Rollout's exit_t and next_t of blocks that left at these steps."""
    after = max(steps) + 1
    return float(times[min(steps)]), float(times[after]) if after < len(times) else 0.0
