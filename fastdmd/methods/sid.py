"""Score identity distillation (SiD 2404.04057; SiD-LSG 2406.01561; flow form Self-Forcing 2506.08009).

Differs from DMD in one thing: z is not detached, and the gradient flows through the inputs of critic and
teacher. Guidance is SiD-LSG's.
"""

from dataclasses import dataclass
from typing import Literal

from fastdmd.batch import Batch
from fastdmd.methods.method import Carry, Loss, Nets
from fastdmd.methods.score_distillation import Draws, ScoreConfig, ScoreDistillation
from fastdmd_kernels import sid_loss


@dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
    name: Literal["sid"]
    alpha: float = 1.0  # 1.0 for flow models and SiD-LSG, 1.2 for EDM


class SiD(ScoreDistillation):
    Config = Config

    def loss(self, phase: str, nets: Nets, batch: Batch, draws: Draws, carry: Carry) -> Loss:
        """Return the critic's loss, or the student's: eq. 23 with the normaliser of DMD.

        `trains` keeps both scores' parameters out of the gradient.
        """
        if phase == "critic":
            return self.critic_loss(nets, batch, draws, carry)
        x0_g = self.last_frames(self.rollout(nets, batch, draws, carry, grad=True))
        z, F_fake, F_c, F_u, c = self.scores(nets, x0_g, batch, draws.score)
        return sid_loss(x0_g, z, F_fake, F_c, F_u, c.a, c.b, self.config.guidance, self.config.alpha)
