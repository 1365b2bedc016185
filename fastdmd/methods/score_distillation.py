"""What DMD and SiD share: a sampled student, a critic that learns its score, and score times.

DMD 2311.18828, DMD2 2405.14867, Self-Forcing 2506.08009. B batch; latents [B, C, T, H, W].
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fastdmd import rollout as rollouts
from fastdmd.batch import Batch, Cond
from fastdmd.causal import sample_blocks
from fastdmd.methods.method import Carry, How, Level, Loss, Method, Nets
from fastdmd.rng import Rng
from fastdmd.sampler import renoise
from fastdmd.schedule import Coeffs, Schedule, send, shift, student_times, timestep_problems, unshift


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    train: Literal["full", "lora"] = "full"
    path: str | None = None  # weights to start from; absent: model.path
    updates_per_generator: int = 5
    updates_per_rollout: int = 1  # critic updates that share one rollout, so one step

    def problems(self) -> Iterator[tuple[str, str]]:
        G, R = self.updates_per_generator, self.updates_per_rollout
        for key, value in (("updates_per_generator", G), ("updates_per_rollout", R)):
            if value < 1:
                yield key, f"{value} is not positive; DMD2 uses 5 and 1"
        if G >= 1 and R >= 1 and G % R:
            yield (
                "updates_per_rollout",
                f"{R} does not divide updates_per_generator = {G}; use one of {_divisors(G)}",
            )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Keys of [method] that DMD and SiD share."""

    uses: ClassVar = ("critic", "rollout")
    guidance_embedding: ClassVar = False
    frames_per_block: ClassVar = None
    flow_only: ClassVar = False

    denoising_timesteps: tuple[float, ...]  # the student's steps, model timesteps in (0, 1000], descending
    guidance: float  # teacher, uncond + w (cond - uncond); published real_guidance_scale g is w = g + 1
    warp_timesteps: bool = False  # denoising_timesteps are nominal and go through flow_shift
    critic_guidance: float = 1.0  # in the student's loss; SiD-LSG's kappa_2, as guidance is its kappa_4
    critic_train_guidance: float = 1.0  # inside the critic's own loss; SiD-LSG's kappa_1
    score_timestep_shift: float | None = None  # absent: schedule.flow_shift
    score_timestep_range: tuple[float, float] = (0.02, 0.98)
    score_window: Literal["none", "lower", "upper", "both"] = "none"

    @property
    def roles(self) -> Mapping[str, How]:
        return {"student": "train", "teacher": "frozen", "critic": "train"}

    @property
    def needs_latents(self) -> str | None:
        return None

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from timestep_problems(self.denoising_timesteps)
        if self.score_timestep_shift is not None and self.score_timestep_shift <= 0:
            yield "score_timestep_shift", f"{self.score_timestep_shift} is not positive; 1 is off"
        low, high = self.score_timestep_range
        if not 0 < low < high <= 1:
            yield "score_timestep_range", f"[{low}, {high}] is not ascending inside (0, 1]; e.g. [0.02, 0.98]"


class Draws(NamedTuple):
    """What a phase of score distillation draws."""

    rollout: rollouts.Draws | None  # None: an earlier phase of the step has made it
    steps: Sequence[Coeffs]  # of the rollout
    score: Level  # at which student's samples are judged, or the critic learns
    gan: Level | None  # at which the discriminator judges


class Scores(NamedTuple):
    """Both scores at z, the student's output noised to the score time."""

    z: Tensor
    F_fake: Tensor
    F_c: Tensor
    F_u: Tensor | None
    c: Coeffs


class ScoreDistillation(Method):
    """Base of DMD and SiD; they add the student's loss."""

    judges = False  # whether a discriminator judges in both phases

    def __init__(
        self, config: Any, schedule: Schedule, *, rollout: rollouts.Config, critic: CriticConfig
    ) -> None:
        self.config = config
        self.schedule = schedule
        self.rollout_config = rollout
        self.guidance = config.guidance
        self.times = student_times(config.denoising_timesteps, config.warp_timesteps, schedule.flow_shift)
        score_shift = config.score_timestep_shift
        self.score_shift = schedule.flow_shift if score_shift is None else score_shift
        self.rollouts_per_generator = critic.updates_per_generator // critic.updates_per_rollout
        self.critic_phases = ("critic",) * critic.updates_per_rollout

    def phases(self, step: int) -> tuple[str, ...]:
        """Return the critic's phases, in every k-th step with the student's before them.

        k = updates_per_generator / updates_per_rollout: a step has one rollout.
        """
        if step % self.rollouts_per_generator == 0:
            return ("student", *self.critic_phases)
        return self.critic_phases

    def sample(self, nets: Nets, noise: Tensor, cond: Cond, uncond: Cond, rng: Rng) -> Tensor:
        student, how = nets["student"], self.rollout_config
        if how.mode == "causal":
            return sample_blocks(
                student, noise, self.times, how.blocks(noise.shape[2]), how.context_noise, cond, rng
            )
        return renoise(student, self.schedule, noise, self.times, cond, rng)

    def draw(self, phase: str, rng: Rng, shape: tuple[int, ...], carry: Carry) -> Draws:
        drawn = None
        if "window" not in carry:
            drawn = rollouts.draw(self.times, self.rollout_config, shape, rng)
            carry["window"] = drawn.window
        times, noise = [self.score_time(rng, carry["window"])], [rng.normal(shape)]
        if self.judges:
            # the critic's phase judges at its own score time, with another noise
            times.append(times[0] if phase == "critic" else self.score_time(rng, carry["window"]))
            noise.append(rng.normal(shape))
        walked = [] if drawn is None else drawn.host_times()
        coeffs, _ = send(self.schedule, [*times, *walked], noise[0])
        levels = [Level(c, eps) for c, eps in zip(coeffs, noise, strict=False)]
        return Draws(drawn, coeffs[len(times) :], levels[0], levels[1] if self.judges else None)

    def rollout(self, nets: Nets, batch: Batch, draws: Draws, carry: Carry, grad: bool) -> Tensor:
        """Return the step's x0_g: made by its first phase, without gradient for the others."""
        if draws.rollout is None:
            return carry["x0_g"]
        x0_g = rollouts.rollout(nets["student"], batch, draws.rollout, draws.steps, self.rollout_config, grad)
        carry["x0_g"] = x0_g.detach()
        return x0_g

    def score_time(self, rng: Rng, window: rollouts.Window) -> Tensor:
        """Return s float64 [B], one for all frames: u ~ U[0, 1), shifted, then clamped to the range.

        A window cuts the shifted law to (next step's time, exit step's time) before the clamp.
        """
        cut = self.config.score_window
        low = window.next_t if cut in ("lower", "both") else 0.0
        high = window.exit_t if cut in ("upper", "both") else 1.0
        u_low, u_high = (
            unshift(torch.tensor(edge, dtype=torch.float64), self.score_shift) for edge in (low, high)
        )
        s = shift(u_low + (u_high - u_low) * rng.uniform(), self.score_shift)
        return s.clamp(*self.config.score_timestep_range)

    def scores(self, nets: Nets, x0: Tensor, batch: Batch, level: Level) -> Scores:
        """Return critic and teacher at z = alpha(s) x0 + sigma(s) eps.

        Guidance is one batched call, left out when off.
        """
        config = self.config
        z = level.noised(x0)
        c = level.c
        F_fake = nets["critic"].guided(z, c, batch.cond, batch.uncond, config.critic_guidance)
        if config.guidance == 1:
            F_c, F_u = nets["teacher"].raw(z, c, batch.cond), None
        else:
            F_c, F_u = nets["teacher"].raw_pair(z, c, batch.cond, batch.uncond)
        return Scores(z, F_fake, F_c, F_u, c)

    def mask(self, x0: Tensor) -> Tensor | None:
        """Return which elements carry the loss: the last `grad_frames` frames; None for all.

        It is bool [1, 1, T, 1, 1] for x0 [B, C, T, H, W].
        """
        k = self.rollout_config.grad_frames
        if k is None:
            return None
        frames = torch.arange(x0.shape[2], device=x0.device) >= x0.shape[2] - k
        return frames.view(1, 1, -1, 1, 1)

    def last_frames(self, x0: Tensor) -> Tensor:
        """Return x0 with gradient in the elements of `mask` only."""
        mask = self.mask(x0)
        return x0 if mask is None else torch.where(mask, x0, x0.detach())

    def critic_loss(self, nets: Nets, batch: Batch, draws: Draws, carry: Carry) -> Loss:
        """Return mean((F_critic(z, s) - target)^2) on the student's samples.

        It is conditional unless `critic_train_guidance`.
        """
        z, target = self.critic_task(nets, batch, draws, carry)
        w = self.config.critic_train_guidance
        F = nets["critic"].guided(z, draws.score.c, batch.cond, batch.uncond, w)
        return (F - target).square().mean(), {}

    def critic_task(self, nets: Nets, batch: Batch, draws: Draws, carry: Carry) -> tuple[Tensor, Tensor]:
        """Return (z, target): a sample of the student noised to the score time, and the F to learn there."""
        x0_g = self.rollout(nets, batch, draws, carry, grad=False)
        return draws.score.noised(x0_g), self.schedule.target(x0_g, draws.score.eps, draws.score.c)
