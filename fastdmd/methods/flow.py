"""Flow matching (2210.02747): makes a teacher, fine-tunes one, and is the baseline.

loss = mean((F - target)^2), target = eps - x0 for flow models; t uniform or logit-normal, then shifted.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastdmd.denoiser import Batch, Denoiser
from fastdmd.rng import Rng
from fastdmd.schedule import add_noise, shift


@dataclass(frozen=True, kw_only=True)
class Config:
    name: Literal["flow"]
    timestep_distribution: Literal["uniform", "logit_normal"] = "uniform"


class Flow:
    Config = Config
    roles: ClassVar = {"student": "train"}
    uses: ClassVar = ()  # config tables beside [method]
    times = None
    guidance = 1.0

    def __init__(self, config: Config, *, flow_shift: float) -> None:
        self.config, self.flow_shift = config, flow_shift

    def phases(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def loss(
        self, phase: str, nets: Mapping[str, Denoiser], batch: Batch, rng: Rng, carry: MutableMapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if batch.x0 is None:
            raise ValueError("method 'flow' trains on latents; the data has prompts only")
        student = nets["student"]
        u = rng.uniform()
        if self.config.timestep_distribution == "logit_normal":
            u = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).sigmoid()
        t = shift(u, self.flow_shift)
        eps = rng.normal(batch.latent_shape)
        F = student.raw(add_noise(student.schedule, batch.x0, eps, t), t, batch.cond)
        return (F - student.schedule.target(batch.x0, eps, t)).square().mean(), {}
