"""Distribution matching distillation (DMD 2311.18828; few steps and critic schedule of DMD2 2405.14867).

The student's loss is the KL between its samples and the teacher's, by the difference of two scores at noised samples.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from fastdmd.denoiser import Batch
from fastdmd.methods.method import Carry, Loss, Nets
from fastdmd.methods.score_distillation import ScoreConfig, ScoreDistillation
from fastdmd.rng import Rng
from fastdmd_kernels import dmd_loss


@dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
    name: Literal["dmd"]


class DMD(ScoreDistillation):
    Config = Config

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, carry: Carry) -> Loss:
        if phase == "critic":
            return self.critic_loss(nets, batch, rng, carry)
        made = self.rollout(nets, batch, rng, carry, grad=True)
        with torch.no_grad():
            z, F_fake, F_c, F_u, c = self.scores(nets, made.x0_g.detach(), made, batch, rng)
        return dmd_loss(made.x0_g, z, F_fake, F_c, F_u, c.a, c.b, self.config.guidance, self.mask(made.x0_g))
