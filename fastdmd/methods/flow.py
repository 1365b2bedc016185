"""Flow matching (2210.02747): makes a teacher, fine-tunes one, and is the baseline.

loss = mean((F - target)^2), target = eps - x0 for flow models; t uniform or logit-normal, then shifted. In
blocks of frames it makes what a causal student starts from: one block, drawn for the batch, is noised, those
before it are clean and seen at t = 0, those after it are left out (teacher forcing).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fastdmd.batch import Batch, Cond
from fastdmd.causal import frame_blocks, ode_blocks
from fastdmd.methods.method import Carry, Level, Loss, Method, Nets, Sampler, ode_sampler
from fastdmd.rng import Rng
from fastdmd.schedule import Coeffs, Schedule, send, shift


@dataclass(frozen=True, kw_only=True)
class Config:
    uses: ClassVar = ()
    needs_latents: ClassVar = "method 'flow'"
    guidance_embedding: ClassVar = False
    flow_only: ClassVar = False
    roles: ClassVar = {"student": "train"}

    name: Literal["flow"]
    timestep_distribution: Literal["uniform", "logit_normal"] = "uniform"
    frames_per_block: int | None = None  # latent frames, for a causal network; absent: all frames are one

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.frames_per_block is not None and self.frames_per_block < 1:
            yield "frames_per_block", f"{self.frames_per_block} is not positive; Self-Forcing uses 3"


class Draws(NamedTuple):
    """What a step of flow matching draws."""

    level: Level
    before: list[Coeffs]  # of the clean blocks before the one that is noised


class Flow(Method):
    Config = Config
    times = None
    guidance = 1.0

    def __init__(self, config: Config, schedule: Schedule) -> None:
        self.config, self.schedule = config, schedule

    def phases(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def draw(self, phase: str, rng: Rng, shape: tuple[int, ...], carry: Carry) -> Draws:
        per_block, block = self.config.frames_per_block, 0
        if per_block is not None:
            blocks = frame_blocks(shape[1], per_block)
            block = rng.shared_integer(len(blocks))
            C, _, H, W = shape
            shape = (C, blocks[block].stop - blocks[block].start, H, W)
        t, eps = self.draw_time(rng), rng.normal(shape)
        (c, *before), _ = send(self.schedule, [t, *[torch.zeros_like(t)] * block], eps)
        return Draws(Level(c, eps), before)

    def loss(self, phase: str, nets: Nets, batch: Batch, draws: Draws, carry: Carry) -> Loss:
        if batch.x0 is None:
            raise ValueError("method 'flow' trains on latents; the data has prompts only")
        if self.config.frames_per_block is not None:
            return self.block_loss(nets, batch, batch.x0, draws, self.config.frames_per_block), {}
        level = draws.level
        F = nets["student"].raw(level.noised(batch.x0), level.c, batch.cond)
        return (F - self.schedule.target(batch.x0, level.eps, level.c)).square().mean(), {}

    def block_loss(self, nets: Nets, batch: Batch, x0: Tensor, draws: Draws, per_block: int) -> Tensor:
        """Return the loss on one block of x0 [B, C, T, H, W]."""
        level, before = draws
        blocks = frame_blocks(x0.shape[2], per_block)[: len(before) + 1]
        frames = blocks[-1]
        clean, x0 = x0[:, :, : frames.start], x0[:, :, frames]
        x_t = torch.cat([clean, level.noised(x0)], dim=2)
        model_t = torch.stack([c.model_t for c in (*before, level.c)], dim=1)
        F = nets["student"].raw_blocks(x_t, model_t, batch.cond, [b.stop - b.start for b in blocks])
        return (F[:, :, frames] - self.schedule.target(x0, level.eps, level.c)).square().mean()

    def samplers(self, steps: int, guidance: float | None) -> dict[str, Sampler]:
        """Return the student's sampler of `steps` Euler steps: guided, or of one block after the other."""
        grid = self.schedule.solver_grid(steps)
        per_block = self.config.frames_per_block
        w = self.guidance if guidance is None else guidance
        if per_block is None:
            return {"student": ode_sampler("student", self.schedule, grid, w)}

        def run(nets: Nets, noise: Tensor, cond: Cond, uncond: Cond, rng: Rng) -> Tensor:
            return ode_blocks(nets["student"], noise, grid, frame_blocks(noise.shape[2], per_block), cond)

        return {"student": Sampler(("student",), run, steps)}

    def draw_time(self, rng: Rng) -> Tensor:
        u = rng.uniform()
        if self.config.timestep_distribution == "logit_normal":
            normal: Any = torch.special  # without types
            u = normal.ndtri(u.clamp(1e-6, 1 - 1e-6)).sigmoid()
        return shift(u, self.schedule.flow_shift)
