"""A step of score distillation on flow models written down in float64, once through.

It reads every key of the configuration. It is what DMD and SiD share; their tests add the student's loss.
B batch, C channel, T frames, H W space.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields
from itertools import pairwise
from typing import Any

import mlp
import torch
from torch import Tensor

from fastdmd import rollout as rollouts
from fastdmd.batch import Cond
from fastdmd.denoiser import Denoiser
from fastdmd.methods.score_distillation import ScoreConfig
from fastdmd.rng import Rng

FLOW_SHIFT = 3.0
BATCH = mlp.make_batch()
BASE: dict[str, Any] = {"denoising_timesteps": (1000.0, 750.0, 500.0), "guidance": 4.0}
DEFAULTS = {field.name: field.default for cls in (ScoreConfig, rollouts.Config) for field in fields(cls)}
# another value of every key that the loss reads
OVERRIDES: dict[str, Any] = {
    "denoising_timesteps": (1000.0, 800.0, 300.0),
    "guidance": 2.0,
    "warp_timesteps": True,
    "critic_guidance": 1.5,
    "critic_train_guidance": 2.5,
    "score_timestep_shift": 1.0,
    "score_timestep_range": (0.5, 0.6),
    "score_window": "both",
    "mode": "data",
    "exit": "last",
    "grad_frames": 1,
}
STUDENT_ONLY = {"guidance", "critic_guidance", "grad_frames"}
CRITIC_ONLY = {"critic_train_guidance"}
CASES: list[dict[str, Any]] = [
    {},
    *({key: value} for key, value in OVERRIDES.items()),
    {"score_window": "lower"},
    {"score_window": "upper"},
    {"guidance": 1.0},
    OVERRIDES,
]


def make_rng(stream: str = "student0") -> Rng:
    """Of a step that exits at the second of three times."""
    step = next(step for step in range(99) if Rng(0, step, stream, [], "cpu").shared_integer(3) == 1)
    return Rng(0, step, stream, range(4), "cpu")


def column(t: Tensor | float) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64).view(-1, 1, 1, 1, 1)


def by_odds(u: Tensor | float, k: float) -> Tensor | float:
    """Return the shift, as it multiplies the odds u / (1 - u) by k."""
    return k * u / (k * u + 1 - u)


class Definition:
    """A step of DMD on flow models written down in float64, once through."""

    def __init__(self, nets: Mapping[str, Denoiser], rng: Rng, **keys: Any) -> None:
        self.nets, self.rng, self.keys = (
            {r: deepcopy(d.net).double() for r, d in nets.items()},
            rng,
            DEFAULTS | keys,
        )
        times = [t / 1000 for t in self.keys["denoising_timesteps"]]
        self.times = [by_odds(t, FLOW_SHIFT) for t in times] if self.keys["warp_timesteps"] else times

    def v(self, role: str, x: Tensor, t: Tensor | float, cond: Cond = BATCH.cond) -> Tensor:
        model_t = 1000 * torch.as_tensor(t, dtype=torch.float64).expand(len(x))
        return self.nets[role](x, model_t, Cond(cond.text.double())).F

    def guided_v(self, role: str, x: Tensor, t: Tensor, w: float) -> Tensor:
        cond, uncond = self.v(role, x, t), self.v(role, x, t, BATCH.uncond)
        return uncond + w * (cond - uncond)

    def normal(self) -> Tensor:
        return self.rng.normal(mlp.SHAPE).double()

    def rollout(self) -> tuple[Tensor, float, float]:
        """x0_g, the exit step's time and the next one's."""
        drawn = self.rng.shared_integer(len(self.times))
        at = len(self.times) - 1 if self.keys["exit"] == "last" else drawn
        x = self.normal()
        if self.keys["mode"] == "data":
            x = (1 - self.times[at]) * BATCH.x0.double() + self.times[at] * x
        else:
            for t, t_next in pairwise(self.times[: at + 1]):
                x0 = (x - t * self.v("student", x, t)).detach()
                x = (1 - t_next) * x0 + t_next * self.normal()
        return (
            x - self.times[at] * self.v("student", x, self.times[at]),
            self.times[at],
            [*self.times, 0.0][at + 1],
        )

    def score_time(self, exit_t: float, next_t: float) -> Tensor:
        """By inversion: the shifted law's distribution function at s is by_odds(s, 1 / k)."""
        k = self.keys["score_timestep_shift"] or FLOW_SHIFT
        low = next_t if self.keys["score_window"] in ("lower", "both") else 0.0
        high = exit_t if self.keys["score_window"] in ("upper", "both") else 1.0
        u = by_odds(low, 1 / k) + self.rng.uniform() * (by_odds(high, 1 / k) - by_odds(low, 1 / k))
        smallest, largest = self.keys["score_timestep_range"]
        return torch.tensor(
            [min(max(float(by_odds(one, k)), smallest), largest) for one in u], dtype=torch.float64
        )

    def student_scores(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(x0_g, z, s, x0_fake, x0_real), nothing detached."""
        x0_g, exit_t, next_t = self.rollout()
        s = self.score_time(exit_t, next_t)
        z = (1 - column(s)) * x0_g + column(s) * self.normal()
        x0_fake = z - column(s) * self.guided_v("critic", z, s, self.keys["critic_guidance"])
        x0_real = z - column(s) * self.guided_v("teacher", z, s, self.keys["guidance"])
        return x0_g, z, s, x0_fake, x0_real

    def frames(self) -> slice:
        """Those that carry the gradient."""
        return slice(-(self.keys["grad_frames"] or mlp.SHAPE[1]), None)

    def critic_gradient(self) -> tuple[Tensor, Tensor]:
        x0_g, exit_t, next_t = self.rollout()
        s, eps, x0_g = self.score_time(exit_t, next_t), self.normal(), x0_g.detach()
        z = (1 - column(s)) * x0_g + column(s) * eps
        loss = (
            (self.guided_v("critic", z, s, self.keys["critic_train_guidance"]) - (eps - x0_g)).square().mean()
        )
        loss.backward()
        return loss.detach(), mlp.gradient(self.nets["critic"])


def close(a: Tensor, b: Tensor) -> bool:
    """To what float32 keeps through four calls of a network."""
    return float((a - b).norm() / b.norm()) < 2e-5
