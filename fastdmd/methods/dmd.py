"""Distribution matching distillation (DMD 2311.18828; few steps, critic schedule and GAN option of DMD2 2405.14867).

The student's loss is the KL between its samples and the teacher's, by the difference of two scores at noised samples.
With a `gan_weight` the critic's hidden states also tell the student's samples from data (DMD2, section 4.3).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from fastdmd.denoiser import Batch, Cond, guide
from fastdmd.methods import gan
from fastdmd.methods.method import Carry, Loss, Nets, Role
from fastdmd.methods.score_distillation import ScoreConfig, ScoreDistillation
from fastdmd.rng import Rng
from fastdmd.rollout import Rollout
from fastdmd.schedule import add_noise
from fastdmd_kernels import dmd_loss


@dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
    name: Literal["dmd"]
    gan_weight: float = 0.0  # of softplus(-D(fake)) in the student's loss; DMD2 uses 5e-3, and 0 is off
    gan_critic_weight: float = 1e-2  # of D's own loss, beside the critic's
    gan_layers: tuple[int, ...] = ()  # blocks of the critic, from 0, whose hidden states D judges by

    @property
    def roles(self) -> Mapping[str, Role]:
        heads: dict[str, Role] = {"disc": "heads"} if self.gan_weight else {}
        return {**super().roles, **heads}

    @property
    def needs_latents(self) -> bool:
        return self.gan_weight > 0

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.gan_weight < 0:
            yield "gan_weight", f"{self.gan_weight} is negative; DMD2 uses 5e-3, and 0 is off"
        if self.gan_critic_weight <= 0:
            yield "gan_critic_weight", f"{self.gan_critic_weight} is not positive; DMD2 uses 1e-2"
        if self.gan_weight > 0 and not self.gan_layers:
            yield "gan_layers", "is empty; name blocks of the critic, e.g. [0, 2]"
        if self.gan_weight == 0 and self.gan_layers:
            yield "gan_layers", "are not used with gan_weight = 0; remove the key, or give a weight"
        yield from gan.layer_problems("gan_layers", self.gan_layers)


class DMD(ScoreDistillation):
    Config = Config

    def trains(self, phase: str) -> tuple[str, ...]:
        return ("critic", "disc") if phase == "critic" and self.config.gan_weight else (phase,)

    def make_heads(self, nets: Nets) -> gan.Heads:
        return gan.make_heads(nets["critic"], self.config.gan_layers, "method.gan_layers")

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, carry: Carry) -> Loss:
        """`trains` keeps the parameters of critic and heads out of the student's gradient."""
        if phase == "critic":
            return (self.gan_critic_loss if self.config.gan_weight else self.critic_loss)(nets, batch, rng, carry)
        made = self.rollout(nets, batch, rng, carry, grad=True)
        with torch.no_grad():
            z, F_fake, F_c, F_u, c = self.scores(nets, made.x0_g.detach(), made, batch, rng)
        mask = self.mask(made.x0_g)
        loss, metrics = dmd_loss(made.x0_g, z, F_fake, F_c, F_u, c.a, c.b, self.config.guidance, mask)
        if self.config.gan_weight:
            shown = made._replace(x0_g=self.last_frames(made.x0_g))
            fooled = gan.softplus_g(self.fake_logits(nets, shown, batch, rng))
            loss, metrics = loss + self.config.gan_weight * fooled, {**metrics, "gan_student": fooled.detach()}
        return loss, metrics

    def fake_logits(self, nets: Nets, made: Rollout, batch: Batch, rng: Rng) -> list[Tensor]:
        """D of the student's samples at another score time; the gradient flows through the critic to them."""
        s = self.score_time(rng, made)
        z = add_noise(self.schedule, made.x0_g, rng.normal(batch.latent_shape), s)
        _, maps = nets["critic"].features(z, s, batch.cond, self.config.gan_layers)
        return nets["disc"].net(maps)[1]

    def gan_critic_loss(self, nets: Nets, batch: Batch, rng: Rng, carry: Carry) -> Loss:
        """`critic_loss` and D's, by one call of the critic: fake and real at one score time, each with own noise."""
        if batch.x0 is None:
            raise ValueError("method.gan_weight > 0 needs data with latents; use 'shapes', or gan_weight = 0")
        fake, s, target = self.critic_task(nets, batch, rng, carry)
        real = add_noise(self.schedule, batch.x0, rng.normal(batch.latent_shape), s)
        w = self.config.critic_train_guidance
        calls = [(fake, batch.cond), (real, batch.cond)] + [(fake, batch.uncond)] * (w != 1)
        z, cond = torch.cat([x for x, _ in calls]), reduce(Cond.cat, [cond for _, cond in calls])
        F, maps = nets["critic"].features(z, s.repeat(len(calls)), cond, self.config.gan_layers)
        F_c, _, *F_u = F.chunk(len(calls))
        _, logits = nets["disc"].net([x[: 2 * len(fake)] for x in maps])
        judged = gan.softplus_d(*gan.halves(logits))
        loss = ((guide(F_u[0], F_c, w) if F_u else F_c) - target).square().mean()
        return loss + self.config.gan_critic_weight * judged, {"gan_critic": judged.detach()}
