"""Flow matching (2210.02747): makes a teacher, fine-tunes one, and is the baseline.

loss = mean((F - target)^2), target = eps - x0 for flow models; t uniform or logit-normal, then shifted.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fastdmd.denoiser import Batch
from fastdmd.methods.method import Carry, Loss, Method, Nets
from fastdmd.rng import Rng
from fastdmd.schedule import Schedule, add_noise, shift


@dataclass(frozen=True, kw_only=True)
class Config:
    name: Literal["flow"]
    uses: ClassVar = ()
    needs_latents: ClassVar = True
    guidance_embedding: ClassVar = False
    roles: ClassVar = {"student": "train"}
    timestep_distribution: Literal["uniform", "logit_normal"] = "uniform"


class Flow(Method):
    Config = Config
    times = None
    guidance = 1.0

    def __init__(self, config: Config, schedule: Schedule) -> None:
        self.config, self.schedule = config, schedule

    def phases(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, carry: Carry) -> Loss:
        if batch.x0 is None:
            raise ValueError("method 'flow' trains on latents; the data has prompts only")
        student = nets["student"]
        u = rng.uniform()
        if self.config.timestep_distribution == "logit_normal":
            u = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).sigmoid()
        t = shift(u, self.schedule.flow_shift)
        eps = rng.normal(batch.latent_shape)
        F = student.raw(add_noise(self.schedule, batch.x0, eps, t), t, batch.cond)
        return (F - self.schedule.target(batch.x0, eps, t)).square().mean(), {}
