"""Backward simulation: the student's own few steps, up to a random exit (DMD2 2405.14867, section 4.5).

It is of whole videos, or of one block of frames after the other (self-forcing, 2506.08009).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastdmd.batch import Batch
from fastdmd.causal import BlockNoise, Walk, draw_blocks, frame_blocks, renoise_blocks
from fastdmd.denoiser import Denoiser
from fastdmd.rng import Rng
from fastdmd.sampler import renoise_steps
from fastdmd.schedule import Coeffs, add_noise

BLOCK_KEYS = ("frames_per_block", "independent_first_frame", "shared_exit_step", "context_noise")


@dataclass(frozen=True, kw_only=True)
class Config:
    mode: Literal["bidirectional", "causal", "data"] = "bidirectional"
    exit: Literal["uniform", "last"] = "uniform"
    # latent frames at the end that carry the loss; absent: all. Causal blocks before them keep no gradient
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
        """Return the blocks of a causal rollout of that many latent frames."""
        assert self.frames_per_block is not None  # `problems` asks for it
        return frame_blocks(frames, self.frames_per_block, self.independent_first_frame)


@dataclass(frozen=True)
class Window:
    """The exit step's time and the next step's, 0 after the last.

    Where blocks exit at different steps, the largest and the smallest of theirs: all frames share one score
    time, so its window has to hold that of each block.
    """

    exit_t: float
    next_t: float


class Draws(NamedTuple):
    """What is drawn for one rollout: the noise that it starts from, and each block's exit step and noise.

    A bidirectional rollout is one block of all frames.
    """

    noise: Tensor  # [B, C, ..]
    exits: list[int]
    blocks: list[BlockNoise]
    times: Tensor  # the student's, float64 [n], and behind them that of the context pass

    @property
    def window(self) -> Window:
        after = max(self.exits) + 1
        next_t = float(self.times[after]) if after < len(self.times) - 1 else 0.0
        return Window(float(self.times[min(self.exits)]), next_t)

    def host_times(self) -> list[Tensor]:
        """Return the times whose coefficients `rollout` takes, each float64 [B]."""
        return [t.expand(len(self.noise)) for t in self.times]


def draw(times: Tensor, config: Config, shape: Sequence[int], rng: Rng) -> Draws:
    """Draw a rollout of latents [C, ..]: each exit step is the same on all ranks.

    times: float64 [n] descending.
    """
    blocks = config.blocks(shape[1]) if config.mode == "causal" else [slice(None)]
    apart = len(blocks) if not config.shared_exit_step else 1
    exits = [_exit_step(times, config, rng) for _ in range(apart)] * (len(blocks) // apart)
    noise = rng.normal(shape)
    if config.mode == "causal":
        drawn = draw_blocks(rng, blocks, exits, shape)
    else:
        steps = 0 if config.mode == "data" else exits[0]
        drawn = [BlockNoise([rng.normal(shape) for _ in range(steps)], None)]
    return Draws(noise, exits, drawn, torch.cat([times, times.new_tensor([config.context_noise])]))


def rollout(
    student: Denoiser, batch: Batch, draws: Draws, coeffs: Sequence[Coeffs], config: Config, grad: bool
) -> Tensor:
    """Return x0_g, the student's output at the exit step e, float32 [B, C, ..].

    Walk steps 0 .. e - 1 without gradient; denoise once at e. Steps past e never run. Gradient, if any, only
    through the exit step. Mode "causal" does so for each block of frames. Mode "data" noises a data latent to
    the exit time in place of the walk. coeffs: of `draws.host_times()`.
    """
    *steps, context = coeffs
    noise, exits, drawn, _ = draws
    if config.mode == "causal":
        T = noise.shape[2]
        blocks = config.blocks(T)
        first = T - (config.grad_frames or T)  # the first frame that carries the loss
        walks = [
            Walk(steps[: e + 1], each, grad and frames.stop > first)
            for e, each, frames in zip(exits, drawn, blocks, strict=True)
        ]
        return renoise_blocks(student, noise, blocks, walks, context, batch.cond)
    (e,), (only,) = exits, drawn
    with torch.no_grad():
        if config.mode == "data":
            if batch.x0 is None:
                raise ValueError("rollout.mode = 'data' needs data with latents; use 'bidirectional'")
            x_t = add_noise(batch.x0, noise, steps[e])
        else:
            x_t = renoise_steps(student, noise, steps[: e + 1], only.eps, batch.cond)
    with torch.set_grad_enabled(grad):
        return student(x_t, steps[e], batch.cond)


def _exit_step(times: Tensor, config: Config, rng: Rng) -> int:
    return len(times) - 1 if config.exit == "last" else rng.shared_integer(len(times))
