"""A step of DCM written down in float64, once through, and cases for its tests.

It reads every key of the configuration.
B batch; latents [B, C, T, H, W].
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields
from typing import Any

import mlp
import torch
from score_definition import column
from test_gan import project
from torch import Tensor

from fastdmd.batch import Cond
from fastdmd.denoiser import Denoiser
from fastdmd.methods.dcm import DCM, Config
from fastdmd.models.net import Call
from fastdmd.rng import Rng
from fastdmd.schedule import FlowSchedule

FLOW_SHIFT = 3.0
BATCH = mlp.make_batch()
SEMANTIC: dict[str, Any] = {
    "expert": "semantic",
    "guidance": 4.0,
    "target": "ema",
    "temporal_weight": 0.5,
    "temporal_lag": 1,
    "solver_steps": 10,
    "boundary_index": 6,
    "huber_c": 0.01,
}
DETAIL_BASE = SEMANTIC | {"expert": "detail", "detail_timesteps": (700.0, 500.0)}
DEFAULTS = {field.name: field.default for field in fields(Config)}
# another value of every key that the loss reads
BOTH: dict[str, Any] = {
    "guidance": 2.0,
    "target": "student",
    "temporal_weight": 1.5,
    "temporal_lag": 2,
    "solver_steps": 12,
    "boundary_index": 7,
    "phases": 4,
    "huber_c": 0.3,
}
ADVERSARIAL: dict[str, Any] = {
    "adversarial_weight": 0.7,
    "hinge_weight": 1.0,
    "feature_weight": 2.0,
    "disc_layers": (1, 2),
}
SAMPLING = {"semantic_timesteps", "detail_timesteps"}
CASES = [
    *((SEMANTIC, {key: value}) for key, value in BOTH.items()),
    *((SEMANTIC, change) for change in ({}, {"guidance": 1.0}, {"temporal_weight": 0.0}, BOTH)),
    *((DETAIL_BASE, {key: value}) for key, value in (BOTH | ADVERSARIAL).items()),
    *((DETAIL_BASE, change) for change in ({}, {"adversarial_weight": 0.0}, BOTH | ADVERSARIAL)),
]


def name_case(value: Any) -> str:
    return value["expert"] if "expert" in value else "-".join(map(str, value))


def make(base: Mapping[str, Any] = SEMANTIC, **keys: Any) -> DCM:
    return DCM(Config(name="dcm", **base | keys), FlowSchedule(FLOW_SHIFT))


def make_rng(stream: str = "student0", size: int = 4) -> Rng:
    return Rng(0, 0, stream, range(size), "cpu")


def make_nets(method: DCM) -> dict[str, Denoiser]:
    roles = (
        "student",
        "teacher",
        *(role for role in method.config.roles if role not in ("student", "teacher")),
    )
    nets = mlp.deep_nets(method.schedule, roles)
    if "disc" not in roles:
        return nets
    torch.manual_seed(7)
    return mlp.with_heads(nets, method.make_heads(nets), method.schedule)


def calls(nets: Mapping[str, Denoiser], role: str) -> list[mlp.Call]:
    return nets[role].net.calls


def S(u: float) -> float:
    return FLOW_SHIFT * u / (FLOW_SHIFT * u + 1 - u)


class Definition:
    """A step of DCM in float64, sample by sample where an index decides."""

    def __init__(self, nets: Mapping[str, Denoiser], **keys: Any) -> None:
        self.nets, self.keys = {r: deepcopy(d.net).double() for r, d in nets.items()}, DEFAULTS | keys
        N, self.boundary = self.keys["solver_steps"], self.keys["boundary_index"]
        self.sigma = [S((j + 1) / N) for j in range(N)]
        self.sigma_prev = [S(1 / 1000), *self.sigma[:-1]]
        self.low, self.high = (self.boundary, N) if self.keys["expert"] == "semantic" else (0, self.boundary)

    def v(self, role: str, x: Tensor, sigma: Tensor, cond: Cond = BATCH.cond) -> Tensor:
        return self.nets[role](x, 1000 * sigma, Cond(cond.text.double())).F

    def end(self, i: int) -> int:
        N, phases = self.keys["solver_steps"], self.keys["phases"]
        return max(p for k in range(phases) if (p := int(k * N / phases + 1e-9) + self.low) <= i)

    def student_loss(self, rng: Rng) -> Tensor:
        w = self.keys["guidance"]
        index = [self.low + int(k) for k in rng.integers(self.high - self.low)]
        ends = [self.end(i) for i in index]
        now = torch.tensor([self.sigma[i] for i in index], dtype=torch.float64)
        prev = torch.tensor([self.sigma_prev[i] for i in index], dtype=torch.float64)
        end = torch.tensor([self.sigma_prev[e] for e in ends], dtype=torch.float64)
        x_t = (1 - column(now)) * BATCH.x0.double() + column(now) * rng.normal(mlp.SHAPE).double()
        made = x_t + column(end - now) * self.v("student", x_t, now)
        with torch.no_grad():
            u, c = self.v("teacher", x_t, now, BATCH.uncond), self.v("teacher", x_t, now)
            x_prev = x_t + column(prev - now) * (u + w * (c - u))
            role = {"ema": "target", "student": "student"}[self.keys["target"]]
            wanted = x_prev + column(end - prev) * self.v(role, x_prev, prev)
        c, lag = self.keys["huber_c"], self.keys["temporal_lag"]
        loss = (((made - wanted) ** 2 + c**2).sqrt() - c).mean()
        moves = [x[:, :, lag:] - x[:, :, :-lag] for x in (made, wanted)]
        loss = loss + self.keys["temporal_weight"] * ((moves[0] - moves[1]) ** 2).mean()
        if self.keys["expert"] == "semantic" or not self.keys["adversarial_weight"]:
            return loss
        u = rng.uniform()
        at = [e + int(float(one) * (self.boundary - e)) for e, one in zip(ends, u, strict=True)]
        a = torch.tensor([self.sigma_prev[j] for j in at], dtype=torch.float64)
        n = rng.normal(mlp.SHAPE).double()
        y = [((1 - column(a)) * z + column(a - end) * n) / (1 - column(end)) for z in (made, wanted)]
        self.adversarial = y[0].detach(), y[1], a
        (fake, logits), (real, _) = (self.judge(x, a) for x in y)
        hinge = torch.stack([(1 - x).clamp(min=0).mean() for x in logits]).mean()
        features = torch.stack(
            [((f - r.detach()) ** 2).mean() for f, r in zip(fake, real, strict=True)]
        ).mean()
        adversarial = self.keys["hinge_weight"] * hinge + self.keys["feature_weight"] * features
        return loss + self.keys["adversarial_weight"] * adversarial

    def judge(self, x: Tensor, sigma: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Projections and logits of each map."""
        given = self.keys["disc_layers"]
        layers = (0, 2) if given is None else given
        _, maps = self.nets["teacher"](
            x, 1000 * sigma, Cond(BATCH.cond.text.double()), Call(layers=tuple(layers))
        )
        judged = [project(head, m, 8) for head, m in zip(self.nets["disc"].heads, maps, strict=True)]
        return [p for p, _ in judged], [logits for _, logits in judged]

    def student_gradient(self) -> tuple[Tensor, Tensor]:
        loss = self.student_loss(make_rng())
        loss.backward()
        return loss.detach(), mlp.gradient(self.nets["student"])

    def disc_gradient(self) -> tuple[Tensor, Tensor]:
        """After a student's phase."""
        self.student_loss(make_rng())
        fake, real, a = self.adversarial
        pairs = zip(self.judge(fake, a)[1], self.judge(real, a)[1], strict=True)
        loss = torch.stack(
            [(1 + f).clamp(min=0).mean() + (1 - r).clamp(min=0).mean() for f, r in pairs]
        ).mean()
        loss.backward()
        return loss.detach(), mlp.gradient(self.nets["disc"])
