"""Backward simulation, and the samplers it shares with validation.

B batch, C channel, T frames, H W space.
"""

from dataclasses import fields
from itertools import pairwise

import mlp
import pytest
import torch
from torch import Tensor

from fastdmd.batch import Batch
from fastdmd.denoiser import Denoiser
from fastdmd.rng import Rng
from fastdmd.rollout import Config, Window
from fastdmd.sampler import guided, ode, renoise
from fastdmd.schedule import FlowSchedule, coeffs

TIMES = torch.tensor([1.0, 0.9, 0.7, 0.4], dtype=torch.float64)
SCHEDULE = FlowSchedule(3.0)
BATCH = mlp.make_batch()


def make_rng(step: int = 0, samples: range = range(4)) -> Rng:
    return Rng(0, step, "student0", samples, "cpu")


def exit_of(step: int) -> int:
    return make_rng(step).shared_integer(len(TIMES))


def step_that_exits(at: int) -> int:
    return next(step for step in range(1000) if exit_of(step) == at)


@pytest.fixture
def student() -> Denoiser:
    return mlp.three_nets(SCHEDULE)["student"]


def roll(student: Denoiser, step: int, grad: bool = True, batch: Batch = BATCH, **config) -> mlp.Rolled:
    return mlp.roll(student, batch, TIMES, Config(**config), make_rng(step), grad)


def column(t: Tensor) -> Tensor:
    return t.float().view(1, 1, 1, 1, 1)


def x0_of(student: Denoiser, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
    """x_t - t v, with the network called by hand."""
    return x_t - column(t) * student.net(x_t, 1000 * t.float().expand(len(x_t)), batch.cond).F


def walk(student: Denoiser, exit_step: int, rng: Rng) -> Tensor:
    """Follow the definition to the exit: x0 = student(x_t), x_t' = (1 - t') x0 + t' eps with fresh eps."""
    x = rng.normal(mlp.SHAPE)
    for t, t_next in pairwise(TIMES[: exit_step + 1]):
        x = (1 - column(t_next)) * x0_of(student, x, t, BATCH) + column(t_next) * rng.normal(mlp.SHAPE)
    return x0_of(student, x, TIMES[exit_step], BATCH)


@pytest.mark.parametrize("exit_step", range(4))
def test_rollout_is_the_walk_to_the_exit_step(student, exit_step):
    step = step_that_exits(exit_step)
    made = roll(student, step)
    times = [call.model_t.tolist() for call in student.net.calls]
    assert times == [[t] * 4 for t in (1000, 900, 700, 400)[: exit_step + 1]]  # and no step past the exit
    torch.testing.assert_close(made.x0_g, walk(student, exit_step, make_rng(step)))
    assert made.window.exit_t == TIMES[exit_step]
    assert made.window.next_t == [*TIMES.tolist(), 0][exit_step + 1]


@pytest.mark.parametrize("exit_step", range(4))
def test_gradient_only_through_the_exit_step(student, exit_step):
    made = roll(student, step_that_exits(exit_step))
    weight = make_rng().normal(mlp.SHAPE)
    (made.x0_g * weight).sum().backward()
    got, calls = mlp.gradient(student.net), student.net.calls
    assert [call.grad for call in calls] == [False] * exit_step + [True]
    student.net.zero_grad()
    (x0_of(student, calls[-1].x_t, TIMES[exit_step], BATCH) * weight).sum().backward()
    torch.testing.assert_close(got, mlp.gradient(student.net))


def test_no_gradient_when_none_is_asked_for(student):
    made = roll(student, step_that_exits(2), grad=False)
    assert not made.x0_g.requires_grad
    assert not any(call.grad for call in student.net.calls)
    assert torch.equal(made.x0_g, roll(student, step_that_exits(2)).x0_g)


def test_exit_is_uniform_and_the_same_on_all_ranks_and_micro_batches(student):
    found, small = [], mlp.make_batch(1)
    for step in range(400):
        rngs = [make_rng(step, range(i, i + 1)) for i in (0, 5)]
        exits = [mlp.roll(student, small, TIMES, Config(), rng, grad=False).window.exit_t for rng in rngs]
        assert exits[0] == exits[1]
        found.append(exits[0])
    counts = torch.tensor([found.count(t) for t in TIMES.tolist()])
    assert counts.sum() == 400
    assert ((counts - 100).abs() < 4 * 75**0.5).all()


def test_exit_last(student):
    for step in range(8):
        made = roll(student, step, exit="last")
        assert made.window == Window(float(TIMES[-1]), 0.0)
    assert len(student.net.calls) == 8 * len(TIMES)


def test_mode_data_noises_a_latent_to_the_exit_time(student):
    for exit_step in range(4):
        step = step_that_exits(exit_step)
        made = roll(student, step, mode="data")
        t, eps = TIMES[exit_step], make_rng(step).normal(mlp.SHAPE)
        torch.testing.assert_close(
            made.x0_g, x0_of(student, (1 - column(t)) * BATCH.x0 + column(t) * eps, t, BATCH)
        )
        assert (made.window.exit_t, made.x0_g.requires_grad) == (t, True)
        assert len(student.net.calls) == 2  # one of them by hand
        student.net.calls.clear()
    with pytest.raises(ValueError, match="needs data with latents"):
        roll(student, 0, batch=Batch(BATCH.cond, BATCH.uncond, mlp.SHAPE), mode="data")


@pytest.mark.parametrize(
    "change",
    [
        {"grad_frames": 0},
        {"frames_per_block": 0},
        {"context_noise": 1.0},
        {"context_noise": -0.1},
        {"frames_per_block": 3},  # no mode = "causal"
        {"independent_first_frame": True, "shared_exit_step": False, "context_noise": 0.5},
    ],
    ids=str,
)
def test_problems_name_the_key(change):
    assert {key for key, _ in Config(**change).problems()} == change.keys()
    assert not list(Config(grad_frames=2).problems())


def test_problems_of_causal_rollouts():
    blocks = {"independent_first_frame": True, "shared_exit_step": False, "context_noise": 0.999}
    assert not list(Config(mode="causal", frames_per_block=3, **blocks).problems())
    for change in (
        {"frames_per_block": None},
        {"frames_per_block": 0},
        {"context_noise": 1.0, "frames_per_block": 3},
    ):
        ((key, _),) = Config(mode="causal", **change).problems()
        assert key == next(iter(change))


def test_every_key_has_a_test():
    """Name the tests of each key.

    mode, exit: above. grad_frames: test_dmd. grad_frames again and what only causal rollouts read:
    test_causal.
    """
    causal = {"frames_per_block", "independent_first_frame", "shared_exit_step", "context_noise"}
    assert {field.name for field in fields(Config)} == {"mode", "exit", "grad_frames"} | causal


# --------------------------------------------------------------------------------- samplers


def test_sampling_is_the_rollout_to_the_last_step(student):
    """What training simulates is what validation does."""
    made, rng = roll(student, 3, exit="last"), make_rng(3)
    sampled = renoise(student, SCHEDULE, rng.normal(mlp.SHAPE), TIMES, BATCH.cond, rng)
    assert torch.equal(sampled, made.x0_g)


def test_guidance_is_one_batched_call(student):
    x_t, t = make_rng().normal(mlp.SHAPE), torch.full((4,), 0.6, dtype=torch.float64)
    c = coeffs(SCHEDULE, t, x_t)
    got = guided(student, BATCH.uncond, 4.0)(x_t, c, BATCH.cond)
    (call,) = student.net.calls
    assert torch.equal(call.text, torch.cat([BATCH.cond.text, BATCH.uncond.text]))
    cond, uncond = student(x_t, c, BATCH.cond), student(x_t, c, BATCH.uncond)
    torch.testing.assert_close(got, uncond + 4 * (cond - uncond))
    assert guided(student, BATCH.uncond, 1.0) is student


def test_guided_ode_calls_once_a_step(student):
    noise, grid = make_rng().normal(mlp.SHAPE), SCHEDULE.solver_grid(5)
    ode(guided(student, BATCH.uncond, 2.0), SCHEDULE, noise, grid, BATCH.cond)
    assert [len(call.x_t) for call in student.net.calls] == [8] * 5
    times = torch.stack([call.model_t for call in student.net.calls], dim=1)
    assert torch.equal(times, (1000 * grid[:-1]).float().expand(8, 5))
