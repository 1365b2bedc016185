"""DMD on three perceptrons, against an independent implementation in float64.

The implementation reads every key of its configuration.
B batch, C channel, T frames, H W space.
"""

from collections.abc import Mapping
from dataclasses import fields
from types import SimpleNamespace
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
    STUDENT_ONLY,
    Definition,
    by_odds,
    close,
    column,
    make_rng,
)
from torch import Tensor

from fastdmd import config as configs
from fastdmd import rollout as rollouts
from fastdmd.config.schema import StudentConfig, TeacherConfig
from fastdmd.denoiser import Denoiser
from fastdmd.methods.dmd import DMD, Config
from fastdmd.methods.score_distillation import CriticConfig
from fastdmd.models.family import ModelConfig
from fastdmd.schedule import FlowSchedule, VPSchedule


def make(flow_shift: float = FLOW_SHIFT, critic: CriticConfig | None = None, **keys: Any) -> DMD:
    keys = BASE | keys
    rollout = {field.name: keys.pop(field.name) for field in fields(rollouts.Config) if field.name in keys}
    config = Config(name="dmd", **keys)
    return DMD(
        config, FlowSchedule(flow_shift), rollout=rollouts.Config(**rollout), critic=critic or CriticConfig()
    )


@pytest.fixture
def nets() -> dict[str, Denoiser]:
    return mlp.three_nets(FlowSchedule(FLOW_SHIFT))


def calls(nets: Mapping[str, Denoiser], role: str) -> list[mlp.Call]:
    return nets[role].net.calls


# ------------------------------------------------------- the whole loss, from the configuration


def dmd_gradient(definition: Definition) -> Tensor:
    """Of mean(x0_g sg(x0_fake - x0_real) / mean_per_sample|x0_g - x0_real|)."""
    x0_g, _, _, x0_fake, x0_real = definition.student_scores()
    gap, p = (x0_fake - x0_real).detach(), (x0_g - x0_real).detach()
    direction = torch.stack([gap[i] / p[i].abs().mean() for i in range(4)])
    definition.nets["student"].zero_grad()
    (x0_g * direction)[:, :, definition.frames()].mean().backward()
    return mlp.gradient(definition.nets["student"])


@pytest.mark.parametrize("change", CASES, ids=lambda change: "-".join(map(str, change)))
def test_student_gradient_is_that_of_the_definition(nets, change):
    """Compare the base configuration and each key changed: a key that is not read would change nothing."""
    loss, metrics = mlp.loss(make(**change), "student", nets, BATCH, make_rng(), {})
    loss.backward()
    got = mlp.gradient(nets["student"].net)
    assert close(got, dmd_gradient(Definition(nets, make_rng(), **BASE | change)))
    assert close(got, dmd_gradient(Definition(nets, make_rng(), **BASE))) == (change.keys() <= CRITIC_ONLY)
    assert metrics.keys() == {"dmd_grad_abs", "normalizer", "score_gap"}


@pytest.mark.parametrize("change", CASES, ids=lambda change: "-".join(map(str, change)))
def test_critic_loss_is_that_of_the_definition(nets, change):
    """Conditional only, on all frames: what makes the student's gradient does not enter."""
    loss, _ = mlp.loss(make(**change), "critic", nets, BATCH, make_rng("critic0"), {})
    loss.backward()
    value, want = Definition(nets, make_rng("critic0"), **BASE | change).critic_gradient()
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=0)
    got = mlp.gradient(nets["critic"].net)
    assert close(got, want)
    _, base = Definition(nets, make_rng("critic0"), **BASE).critic_gradient()
    assert close(got, base) == (change.keys() <= STUDENT_ONLY)


def test_critic_of_an_eps_model_learns_eps():
    schedule = VPSchedule(torch.cumprod(1 - torch.linspace(1e-3, 1e-2, 1000, dtype=torch.float64), 0), "eps")
    nets, carry = mlp.three_nets(schedule), {}
    method = make()
    method.schedule = schedule
    loss, _ = mlp.loss(method, "critic", nets, BATCH, make_rng(), carry)
    (call,) = calls(nets, "critic")
    s = (call.model_t.double() + 1) / 1000
    alpha, sigma = column(schedule.alpha(s)), column(schedule.sigma(s))
    eps = (call.x_t - alpha * carry["x0_g"]) / sigma
    F = nets["critic"].net(call.x_t, call.model_t, BATCH.cond).F
    torch.testing.assert_close(loss.double(), (F - eps).square().mean(), rtol=1e-5, atol=0)


def test_every_key_has_a_test():
    """The rest: updates_per_* and path below, causal rollouts' in test_causal, train in test_shared_base."""
    keys = {field.name for cls in (Config, CriticConfig, rollouts.Config) for field in fields(cls)}
    elsewhere = {"updates_per_generator", "updates_per_rollout", "path", "train", "name"}
    causal = {"frames_per_block", "independent_first_frame", "shared_exit_step", "context_noise"}
    gan = {"gan_weight", "gan_critic_weight", "gan_layers"}  # in test_gan
    assert keys == OVERRIDES.keys() | elsewhere | causal | gan


# --------------------------------------------------------------- who is called, and who learns


@pytest.mark.parametrize(("teacher_w", "critic_w"), [(4.0, 1.0), (1.0, 1.0), (1.0, 3.0), (4.0, 3.0)])
def test_guidance_is_one_batched_call_and_none_when_off(nets, teacher_w, critic_w):
    mlp.loss(make(guidance=teacher_w, critic_guidance=critic_w), "student", nets, BATCH, make_rng(), {})
    both = torch.cat([BATCH.cond.text, BATCH.uncond.text])
    for role, w in (("teacher", teacher_w), ("critic", critic_w)):
        (call,) = calls(nets, role)
        assert torch.equal(call.text, BATCH.cond.text if w == 1 else both)
        assert not call.grad


def test_critic_and_teacher_see_one_z_with_a_time_for_each_sample(nets):
    mlp.loss(make(), "student", nets, BATCH, make_rng(), {})
    (teacher,), (critic,) = calls(nets, "teacher"), calls(nets, "critic")
    for seen, by_critic in zip(teacher[:2], critic[:2], strict=True):
        assert torch.equal(seen, torch.cat([by_critic, by_critic]))
    assert len(critic.model_t.unique()) == 4


@pytest.mark.parametrize("phase", ["student", "critic"])
def test_only_the_phase_s_own_network_gets_a_gradient(nets, phase):
    """Though every parameter of all three asks for one, and the critic's rollout may be the student's."""
    carry: dict[str, Any] = {}
    mlp.loss(make(), phase, nets, BATCH, make_rng(), carry)[0].backward()
    assert mlp.with_gradient(nets) == {phase}
    if phase == "critic":
        assert not calls(nets, "teacher")
    nets[phase].net.zero_grad()
    mlp.loss(make(), "critic", nets, BATCH, make_rng("critic1"), carry)[0].backward()
    assert mlp.with_gradient(nets) == {"critic"}


def test_phases_of_a_step_share_one_rollout(nets):
    method, carry = make(), {}
    mlp.loss(method, "student", nets, BATCH, make_rng(), carry)
    after_student, first, window = len(calls(nets, "student")), carry["x0_g"], carry["window"]
    assert after_student == 2
    for index in (1, 2):
        mlp.loss(method, "critic", nets, BATCH, make_rng(f"critic{index}"), carry)
        assert carry["x0_g"] is first
        assert carry["window"] is window
        assert not first.requires_grad
    assert len(calls(nets, "student")) == after_student
    times = [call.model_t for call in calls(nets, "critic")]
    assert not torch.equal(times[1], times[2])  # but not their score times


def test_what_phases_share_is_the_rollout_without_its_graph(nets):
    method, carry = make(), {}
    draws = method.draw("student", make_rng(), mlp.SHAPE, carry)
    x0_g = method.rollout(nets, BATCH, draws, carry, grad=True)
    assert x0_g.requires_grad
    assert not carry["x0_g"].requires_grad
    assert torch.equal(carry["x0_g"], x0_g)
    assert carry["window"] == draws.rollout.window


def test_critic_only_steps_roll_out_without_gradient(nets):
    carry: dict[str, Any] = {}
    mlp.loss(make(), "critic", nets, BATCH, make_rng("critic0"), carry)
    assert [call.grad for call in calls(nets, "student")] == [False, False]
    mlp.loss(make(), "critic", nets, BATCH, make_rng("critic1"), carry)
    assert len(calls(nets, "student")) == 2


# ------------------------------------------------------------------------------- score times


def grid_times(
    exit_t: float = 0.75, next_t: float = 0.5, flow_shift: float = FLOW_SHIFT, **keys: Any
) -> Tensor:
    """s for u = 0, 0.01, .. 1."""
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    window = rollouts.Window(exit_t, next_t)
    return make(flow_shift, **keys).score_time(SimpleNamespace(uniform=lambda: u), window)


def test_score_times_are_shifted_and_then_clamped():
    """A clamp before the shift would leave the range: 0.02 goes to 0.09, 0.98 to 0.996 at shift 5."""
    s = grid_times(score_timestep_shift=5.0)
    shifted = by_odds(torch.linspace(0, 1, 101, dtype=torch.float64), 5.0)
    assert (s.min(), s.max()) == (0.02, 0.98)
    inside = (shifted > 0.02) & (shifted < 0.98)
    torch.testing.assert_close(s[inside], shifted[inside], rtol=1e-12, atol=0)
    assert inside.sum() > 80
    assert s.dtype == torch.float64


@pytest.mark.parametrize("flow_shift", [1.0, 8.0])
def test_score_shift_is_flow_shift_unless_given(flow_shift):
    torch.testing.assert_close(
        grid_times(flow_shift=flow_shift), grid_times(score_timestep_shift=flow_shift), rtol=0, atol=0
    )
    assert grid_times(flow_shift=flow_shift, score_timestep_shift=1.0)[50] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("window", "low", "high"),
    [("none", 0.02, 0.98), ("lower", 0.5, 0.98), ("upper", 0.02, 0.75), ("both", 0.5, 0.75)],
)
def test_score_windows(window, low, high):
    """Of an exit at 0.75 before 0.5; inside, the shifted law without the rest."""
    s = grid_times(score_window=window)
    assert (s.min().item(), s.max().item()) == pytest.approx((low, high))
    u = by_odds(s, 1 / FLOW_SHIFT)
    inside = (s > low) & (s < high)
    spacing = u[inside].diff()
    torch.testing.assert_close(spacing, spacing[:1].expand_as(spacing), rtol=1e-9, atol=0)


def test_the_window_of_the_last_step_reaches_to_the_range():
    s = grid_times(exit_t=0.5, next_t=0.0, score_window="both")
    assert (s.min().item(), s.max().item()) == pytest.approx((0.02, 0.5))


# ------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("generator", "rollout", "want"),
    [
        (1, 1, ["SC", "SC", "SC", "SC"]),
        (2, 1, ["SC", "C", "SC", "C"]),
        (3, 1, ["SC", "C", "C", "SC"]),
        (2, 2, ["SCC", "SCC", "SCC", "SCC"]),
        (4, 2, ["SCC", "CC", "SCC", "CC"]),
    ],
)
def test_phases(generator, rollout, want):
    """updates_per_generator critic updates for every student update, updates_per_rollout of them a step."""
    method = make(critic=CriticConfig(updates_per_generator=generator, updates_per_rollout=rollout))
    assert ["".join(phase[0].upper() for phase in method.phases(step)) for step in range(4)] == want
    assert method.config.roles == {"student": "train", "teacher": "frozen", "critic": "train"}


def test_each_role_starts_from_its_own_path():
    """Absent, from model.path: the critic of a causal student is not causal."""
    tables = {"critic": CriticConfig, "student": StudentConfig, "teacher": TeacherConfig}
    model = ModelConfig(family="wan2.1", path="of the model")
    rest = dict.fromkeys(("run", "schedule", "method", "data"))
    for given in [(), *((role,) for role in tables), tuple(tables)]:
        paths = {role: tables[role](path=f"of the {role}") for role in given}
        config = configs.Config(model=model, optim={}, **paths, **rest)
        for role in tables:
            assert config.role_source(role) == (
                (f"{role}.path", f"of the {role}") if role in given else ("model.path", "of the model")
            )


@pytest.mark.parametrize(
    "change",
    [
        {"denoising_timesteps": ()},
        {"denoising_timesteps": (1000.0, 0.0)},
        {"denoising_timesteps": (1000.0, 500.0, 750.0)},
        {"denoising_timesteps": (1000.0, 500.0, 500.0)},
        {"denoising_timesteps": (900.0, 500.0)},
        {"score_timestep_shift": 0.0},
        {"score_timestep_range": (0.0, 0.98)},
        {"score_timestep_range": (0.9, 0.1)},
    ],
    ids=str,
)
def test_problems_name_the_key(change):
    assert [key for key, _ in Config(name="dmd", **BASE | change).problems()] == list(change)
    assert not list(Config(name="dmd", **BASE).problems())


def test_critic_updates_have_to_divide():
    def problems(generator: int, rollout: int) -> list[tuple[str, str]]:
        return list(CriticConfig(updates_per_generator=generator, updates_per_rollout=rollout).problems())

    assert problems(6, 3) == []
    ((key, message),) = problems(6, 4)
    assert (key, message[-12:]) == ("updates_per_rollout", "[1, 2, 3, 6]")
    assert [key for key, _ in problems(0, 1)] == ["updates_per_generator"]
