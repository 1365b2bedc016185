"""Flow matching (2210.02747): makes a teacher, fine-tunes one, and is the baseline.

loss = mean((F - target)^2), target = eps - x0 for flow models; t uniform or logit-normal, then shifted. In blocks of
frames it makes what a causal student starts from: one block, drawn for the batch, is noised, those before it are clean
and seen at t = 0, those after it are left out (teacher forcing).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastdmd.causal import frame_blocks
from fastdmd.denoiser import Batch
from fastdmd.methods.method import Carry, Loss, Method, Nets
from fastdmd.rng import Rng
from fastdmd.schedule import Schedule, add_noise, shift


@dataclass(frozen=True, kw_only=True)
class Config:
    uses: ClassVar = ()
    needs_latents: ClassVar = True
    guidance_embedding: ClassVar = False
    roles: ClassVar = {"student": "train"}

    name: Literal["flow"]
    timestep_distribution: Literal["uniform", "logit_normal"] = "uniform"
    frames_per_block: int | None = None  # latent frames, for a causal network; absent: all frames are one

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.frames_per_block is not None and self.frames_per_block < 1:
            yield "frames_per_block", f"{self.frames_per_block} is not positive; Self-Forcing uses 3"


class Flow(Method):
    Config = Config
    times = None
    guidance = 1.0

    def __init__(self, config: Config, schedule: Schedule) -> None:
        self.config, self.schedule, self.frames_per_block = config, schedule, config.frames_per_block

    def phases(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, carry: Carry) -> Loss:
        if batch.x0 is None:
            raise ValueError("method 'flow' trains on latents; the data has prompts only")
        if self.config.frames_per_block is not None:
            return self.block_loss(nets, batch, batch.x0, rng), {}
        t, eps = self.draw_time(rng), rng.normal(batch.latent_shape)
        F = nets["student"].raw(add_noise(self.schedule, batch.x0, eps, t), t, batch.cond)
        return (F - self.schedule.target(batch.x0, eps, t)).square().mean(), {}

    def block_loss(self, nets: Nets, batch: Batch, x0: Tensor, rng: Rng) -> Tensor:
        """On one block of x0 [B, C, T, H, W]."""
        assert self.config.frames_per_block is not None
        blocks = frame_blocks(x0.shape[2], self.config.frames_per_block)
        at = rng.shared_integer(len(blocks))
        frames, t = blocks[at], self.draw_time(rng)
        clean, x0 = x0[:, :, : frames.start], x0[:, :, frames]
        eps = rng.normal(x0.shape[1:])
        x_t = torch.cat([clean, add_noise(self.schedule, x0, eps, t)], dim=2)
        times = torch.cat([torch.zeros(len(t), at, dtype=t.dtype), t[:, None]], dim=1)
        F = nets["student"].raw_blocks(x_t, times, batch.cond, [b.stop - b.start for b in blocks[: at + 1]])
        return (F[:, :, frames] - self.schedule.target(x0, eps, t)).square().mean()

    def draw_time(self, rng: Rng) -> Tensor:
        u = rng.uniform()
        if self.config.timestep_distribution == "logit_normal":
            u = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).sigmoid()
        return shift(u, self.schedule.flow_shift)
