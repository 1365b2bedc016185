"""Distribution matching distillation (DMD 2311.18828; DMD2 2405.14867).

The student's loss is the KL between its samples and the teacher's, by the difference of two scores at noised
samples. Few steps, the critic's schedule and the GAN are DMD2's: with a `gan_weight` the critic's hidden
states also tell the student's samples from data (section 4.3).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from fastdmd.batch import Batch, Cond
from fastdmd.methods import gan
from fastdmd.methods.method import Carry, How, Level, Loss, Nets
from fastdmd.methods.score_distillation import Draws, ScoreConfig, ScoreDistillation
from fastdmd_kernels import dmd_loss, guide


@dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
    name: Literal["dmd"]
    gan_weight: float = 0.0  # of softplus(-D(fake)) in the student's loss; DMD2 uses 5e-3, and 0 is off
    gan_critic_weight: float = 1e-2  # of D's own loss, beside the critic's
    gan_layers: tuple[int, ...] = ()  # blocks of the critic, from 0, whose hidden states D judges by

    @property
    def roles(self) -> Mapping[str, How]:
        heads: dict[str, How] = {"disc": "heads"} if self.gan_weight else {}
        return {**super().roles, **heads}

    @property
    def needs_latents(self) -> str | None:
        return "method.gan_weight > 0" if self.gan_weight > 0 else None

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

    @property
    def judges(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.config.gan_weight > 0

    def trains(self, phase: str) -> tuple[str, ...]:
        return ("critic", "disc") if phase == "critic" and self.judges else (phase,)

    def make_heads(self, nets: Nets) -> gan.Heads:
        return gan.make_heads(nets["critic"], self.config.gan_layers, "method.gan_layers")

    def loss(self, phase: str, nets: Nets, batch: Batch, draws: Draws, carry: Carry) -> Loss:
        """Return the loss of a phase.

        `trains` keeps the parameters of critic and heads out of the student's gradient.
        """
        if phase == "critic":
            if draws.gan is None:
                return self.critic_loss(nets, batch, draws, carry)
            return self.gan_critic_loss(nets, batch, draws, draws.gan, carry)
        x0_g = self.rollout(nets, batch, draws, carry, grad=True)
        with torch.no_grad():
            z, F_fake, F_c, F_u, c = self.scores(nets, x0_g.detach(), batch, draws.score)
        loss, metrics = dmd_loss(x0_g, z, F_fake, F_c, F_u, c.a, c.b, self.config.guidance, self.mask(x0_g))
        if draws.gan is not None:
            fooled = gan.softplus_g(self.fake_logits(nets, self.last_frames(x0_g), batch, draws.gan))
            loss = loss + self.config.gan_weight * fooled
            metrics = {**metrics, "gan_student": fooled.detach()}
        return loss, metrics

    def fake_logits(self, nets: Nets, x0_g: Tensor, batch: Batch, level: Level) -> list[Tensor]:
        """Return D of the student's samples at another score time.

        The gradient flows through the critic to them.
        """
        layers = self.config.gan_layers
        _, maps = nets["critic"].features(level.noised(x0_g), level.c.model_t, batch.cond, layers)
        return gan.heads(nets)(maps)[1]

    def gan_critic_loss(self, nets: Nets, batch: Batch, draws: Draws, judged: Level, carry: Carry) -> Loss:
        """Return `critic_loss` and D's, by one call of the critic.

        Fake and real are at one score time, each with its own noise.
        """
        if batch.x0 is None:
            raise ValueError("method.gan_weight > 0 needs data with latents; use 'shapes', or gan_weight = 0")
        fake, target = self.critic_task(nets, batch, draws, carry)
        real = judged.noised(batch.x0)
        w = self.config.critic_train_guidance
        calls = [(fake, batch.cond), (real, batch.cond)]
        if w != 1:
            calls.append((fake, batch.uncond))
        z = torch.cat([x for x, _ in calls])
        cond = reduce(Cond.cat, [cond for _, cond in calls])
        model_t = draws.score.c.model_t.repeat(len(calls))
        F, maps = nets["critic"].features(z, model_t, cond, self.config.gan_layers)
        F_c, _, *F_u = F.chunk(len(calls))
        _, logits = gan.heads(nets)([x[: 2 * len(fake)] for x in maps])
        F_guided = guide(F_u[0], F_c, w) if F_u else F_c
        loss = (F_guided - target).square().mean()
        gan_loss = gan.softplus_d(*gan.halves(logits))
        return loss + self.config.gan_critic_weight * gan_loss, {"gan_critic": gan_loss.detach()}
