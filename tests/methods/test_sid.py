"""SiD on three perceptrons, against an independent implementation in float64, and on known scores.

B batch, C channel, T frames, H W space.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import mlp
import pytest
import torch
from score_definition import (
    BASE,
    BATCH,
    CASES,
    CRITIC_ONLY,
    FLOW_SHIFT,
    OVERRIDES,
    Definition,
    close,
    make_rng,
)
from torch import Tensor, nn

from fastdmd import rollout as rollouts
from fastdmd.denoiser import Denoiser
from fastdmd.methods.score_distillation import CriticConfig
from fastdmd.methods.sid import Config, SiD
from fastdmd.schedule import FlowSchedule

SID_CASES = [*CASES, {"alpha": 1.2}, {"alpha": 0.5, "guidance": 1.0}]


def make(**keys: Any) -> SiD:
    keys = BASE | keys
    rollout = {field.name: keys.pop(field.name) for field in fields(rollouts.Config) if field.name in keys}
    schedule = FlowSchedule(FLOW_SHIFT)
    return SiD(
        Config(name="sid", **keys), schedule, rollout=rollouts.Config(**rollout), critic=CriticConfig()
    )


@pytest.fixture
def nets() -> dict[str, Denoiser]:
    found = mlp.three_nets(FlowSchedule(FLOW_SHIFT))
    for role in ("teacher", "critic"):  # as the trainer has them in this phase
        found[role].net.requires_grad_(False)
    return found


def sid_gradient(definition: Definition, stopped: bool = False) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of eq. 23 in x0; `stopped`: the mutant whose scores are constants."""
    x0_g, _, _, x0_fake, x0_real = definition.student_scores()
    if stopped:
        x0_fake, x0_real = x0_fake.detach(), x0_real.detach()
    alpha = definition.keys.get("alpha", 1.0)
    gap = x0_real - x0_fake
    normalizer = torch.stack([one.abs().mean() for one in (x0_g - x0_real).detach()]).view(-1, 1, 1, 1, 1)
    loss = (gap * ((x0_real - x0_g) - alpha * gap) / normalizer).mean()
    loss.backward()
    return loss.detach(), mlp.gradient(definition.nets["student"])


class LastFrames(Definition):
    """A student whose earlier frames carry no gradient, from its output on."""

    def rollout(self) -> tuple[Tensor, float, float]:
        x0_g, exit_t, next_t = super().rollout()
        mask = torch.zeros(mlp.SHAPE[1], dtype=torch.bool)
        mask[self.frames()] = True
        return torch.where(mask.view(1, 1, -1, 1, 1), x0_g, x0_g.detach()), exit_t, next_t


@pytest.mark.parametrize("change", SID_CASES, ids=lambda change: "-".join(map(str, change)))
def test_student_gradient_is_that_of_the_definition(nets, change):
    """Compare the base configuration and each key changed: a key that is not read would change nothing."""
    loss, metrics = mlp.loss(make(**change), "student", nets, BATCH, make_rng(), {})
    loss.backward()
    got = mlp.gradient(nets["student"].net)
    value, want = sid_gradient(LastFrames(nets, make_rng(), **BASE | change))
    assert close(got, want)
    torch.testing.assert_close(loss.double(), value, rtol=1e-4, atol=1e-6)
    _, base = sid_gradient(LastFrames(nets, make_rng(), **BASE))
    assert close(got, base) == (change.keys() <= CRITIC_ONLY)
    assert metrics.keys() == {"normalizer", "score_gap"}


@pytest.mark.parametrize("change", [{}, {"critic_train_guidance": 2.5}], ids=str)
def test_critic_loss_is_dmd_s(nets, change):
    nets["critic"].net.requires_grad_(True)
    mlp.loss(make(**change), "critic", nets, BATCH, make_rng("critic0"), {})[0].backward()
    _, want = Definition(nets, make_rng("critic0"), **BASE | change).critic_gradient()
    assert close(mlp.gradient(nets["critic"].net), want)


def test_every_key_has_a_test():
    keys = {field.name for cls in (Config, rollouts.Config) for field in fields(cls)}
    causal = {
        "frames_per_block",
        "independent_first_frame",
        "shared_exit_step",
        "context_noise",
    }  # in test_causal.py
    assert keys == OVERRIDES.keys() | {"alpha", "name"} | causal


def test_stopping_the_scores_keeps_the_value_and_moves_the_gradient(nets):
    """The usual mistake: a loss curve does not show it."""
    loss, _ = mlp.loss(make(), "student", nets, BATCH, make_rng(), {})
    loss.backward()
    got = mlp.gradient(nets["student"].net)
    value, mutant = sid_gradient(Definition(nets, make_rng(), **BASE), stopped=True)
    torch.testing.assert_close(loss.double(), value, rtol=1e-4, atol=0)
    assert float((got - mutant).norm() / got.norm()) > 0.05


def test_scores_get_no_gradient_and_no_buffer_for_one(nets):
    mlp.loss(make(), "student", nets, BATCH, make_rng(), {})[0].backward()
    assert mlp.with_gradient(nets) == {"student"}
    assert [nets[role].net.calls[-1].grad for role in ("teacher", "critic")] == [True, True]


# ------------------------------------------------------------------------- scores that are known


class GaussianScore(mlp.Formula):
    """v of data N(mean, scale^2): E[eps - x0 | x_t] at x_t = (1 - t) x0 + t eps."""

    def __init__(self, mean: float, scale: float) -> None:
        super().__init__()
        self.mean, self.scale = mean, scale

    def F(self, x_t: Tensor, model_t: Tensor) -> Tensor:
        t = model_t.view(-1, *[1] * (x_t.ndim - 1)) / 1000
        variance = ((1 - t) * self.scale) ** 2 + t**2
        centred = x_t - (1 - t) * self.mean
        x0 = self.mean + (1 - t) * self.scale**2 / variance * centred
        return (t / variance) * centred - x0


class Affine(mlp.Formula):
    """A student whose x0 from pure noise is N(mean, scale^2), by the flow map of a Gaussian at t = 1."""

    def __init__(self, mean: float, scale: float) -> None:
        super().__init__()
        self.mean, self.scale = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(scale))

    def F(self, x_t: Tensor, model_t: Tensor) -> Tensor:
        return x_t - (self.mean + self.scale * x_t)  # at t = 1: x0 = x_t - v


def gaussian_nets(teacher: tuple[float, float], student: tuple[float, float]) -> Mapping[str, Denoiser]:
    """With the critic that has learned the student exactly."""
    made = {
        "student": Affine(*student),
        "teacher": GaussianScore(*teacher),
        "critic": GaussianScore(*student),
    }
    return {role: Denoiser(net, FlowSchedule(FLOW_SHIFT)) for role, net in made.items()}


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_the_loss_and_its_gradient_vanish_at_the_optimum_only(alpha):
    def student_gradient(student: tuple[float, float]) -> tuple[float, float]:
        nets = gaussian_nets((0.5, 0.8), student)
        method = make(alpha=alpha, guidance=1.0, denoising_timesteps=(1000.0,))
        loss, _ = mlp.loss(method, "student", nets, BATCH, make_rng(), {})
        loss.backward()
        return abs(loss.item()), mlp.gradient(nets["student"].net).norm().item()

    loss, gradient = student_gradient((0.5, 0.8))
    assert loss < 1e-12
    assert gradient < 1e-6
    assert all(student_gradient(away)[1] > 1e-3 for away in ((0.9, 0.8), (0.5, 0.4)))


def test_a_step_against_the_gradient_comes_nearer_to_the_teacher():
    """A wrong sign would move the mean away."""
    nets = gaussian_nets((0.5, 0.8), (1.0, 0.8))
    method = make(guidance=1.0, denoising_timesteps=(1000.0,))
    mlp.loss(method, "student", nets, BATCH, make_rng(), {})[0].backward()
    assert float(nets["student"].net.mean.grad) > 0
