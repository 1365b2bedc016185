"""LCM on perceptrons, against an independent implementation in float64, and on worlds with known flow maps.

Its sampler is compared with diffusers' scheduler. B batch.
"""

from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

import mlp
import pytest
import torch
from torch import Tensor

from fastdmd.batch import Batch, Cond
from fastdmd.denoiser import Denoiser
from fastdmd.methods.lcm import LCM, Config
from fastdmd.models.net import PLAIN, Call, Out
from fastdmd.rng import Rng
from fastdmd.schedule import FlowSchedule, Schedule, VPSchedule

BATCH = mlp.make_batch()
# SDXL's
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
FLOW, VP = FlowSchedule(3.0), VPSchedule(ALPHAS, "eps")
BASE: dict[str, Any] = {
    "denoising_timesteps": (1000.0, 760.0, 500.0, 260.0),
    "guidance_range": (3.0, 15.0),
    "guidance": 8.0,
}
DEFAULTS = {field.name: field.default for field in fields(Config)}
# another value of every key that the loss reads
OVERRIDES: dict[str, Any] = {
    "guidance_range": (1.0, 1.0),
    "target": "student",
    "guidance_embedding": True,
    "solver_steps": 10,
    "loss": "l2",
    "huber_c": 0.5,
}
VP_ONLY = {"boundary_timestep_scaling": 1e-3}


def make(schedule: Schedule = FLOW, **keys: Any) -> LCM:
    return LCM(Config(name="lcm", **BASE | keys), schedule)


def make_rng() -> Rng:
    return Rng(0, 3, "student0", range(4), "cpu")


def four_nets(schedule: Schedule) -> dict[str, Denoiser]:
    nets = mlp.three_nets(schedule)
    nets["target"] = Denoiser(mlp.MLP(7), schedule)
    return nets


def column(t: Tensor) -> Tensor:
    return t.double().view(-1, 1, 1, 1, 1)


# ------------------------------------------------------- the whole loss, from the configuration


class Definition:
    """A step of LCM written down in float64, with timestep indices for SDXL and times for flow models."""

    def __init__(self, nets: dict[str, Denoiser], flow: bool, **keys: Any) -> None:
        self.nets = {role: deepcopy(net.net).double() for role, net in nets.items()}
        self.flow, self.keys, self.rng = flow, DEFAULTS | BASE | keys, make_rng()

    def alpha_sigma(self, at: Tensor) -> tuple[Tensor, Tensor]:
        if self.flow:
            return 1 - column(at), column(at)
        return column(ALPHAS[at.long()].sqrt()), column((1 - ALPHAS[at.long()]).sqrt())

    def F(self, role: str, z: Tensor, at: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        model_t = 1000 * at if self.flow else at.double()
        return self.nets[role](z, model_t, Cond(cond.text.double(), guidance=w)).F

    def x0(self, z: Tensor, at: Tensor, F: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(at)
        return z - sigma * F if self.flow else (z - sigma * F) / alpha

    def f(self, role: str, z: Tensor, at: Tensor, w: Tensor) -> Tensor:
        x0 = self.x0(z, at, self.F(role, z, at, BATCH.cond, w if self.keys["guidance_embedding"] else None))
        if self.flow:
            return x0
        k = self.keys["boundary_timestep_scaling"] * column(at)
        return 0.25 / (k**2 + 0.25) * z + k / (k**2 + 0.25) ** 0.5 * x0

    def times(self, i: Tensor) -> tuple[Tensor, Tensor]:
        N = self.keys["solver_steps"]
        if self.flow:
            u, u_next = (N - i) / N, (N - i - 1) / N
            return 3 * u / (3 * u + 1 - u), 3 * u_next / (3 * u_next + 1 - u_next)
        k = 1000 // N
        t = (N - i) * k - 1
        return t, (t - k).clamp(min=0)

    def gradient(self) -> tuple[Tensor, Tensor]:
        i = self.rng.integers(self.keys["solver_steps"])
        low, high = self.keys["guidance_range"]
        w = low + (high - low) * self.rng.uniform()
        t, t_next = self.times(i)
        alpha, sigma = self.alpha_sigma(t)
        z = alpha * BATCH.x0.double() + sigma * self.rng.normal(mlp.SHAPE).double()
        with torch.no_grad():
            cond, uncond = self.F("teacher", z, t, BATCH.cond), self.F("teacher", z, t, BATCH.uncond)
            F = uncond + column(w) * (cond - uncond)
            x0 = self.x0(z, t, F)
            eps = z + (1 - sigma) * F if self.flow else F
            alpha_next, sigma_next = self.alpha_sigma(t_next)
            z_next = alpha_next * x0 + sigma_next * eps
            wanted = self.f("target" if self.keys["target"] == "ema" else "student", z_next, t_next, w)
        d, c = self.f("student", z, t, w) - wanted, self.keys["huber_c"]
        loss = (d**2).mean() if self.keys["loss"] == "l2" else ((d**2 + c**2).sqrt() - c).mean()
        loss.backward()
        return loss.detach(), mlp.gradient(self.nets["student"])


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm() / b.norm()) < 1e-4


CASES = [
    (name, change)
    for name in ("flow", "vp")
    for change in [
        {},
        *({k: v} for k, v in OVERRIDES.items()),
        {"guidance_range": (1.0, 3.0)},  # from where guidance is off
        OVERRIDES,
        *([VP_ONLY] if name == "vp" else []),
    ]
]


@pytest.mark.parametrize(("name", "change"), CASES, ids=str)
def test_gradient_is_that_of_the_definition(name, change):
    """Compare the base configuration and each key changed: a key that is not read would change nothing."""
    schedule = FLOW if name == "flow" else VP
    nets = four_nets(schedule)
    loss, _ = mlp.loss(make(schedule, **change), "student", nets, BATCH, make_rng(), {})
    loss.backward()
    got = mlp.gradient(nets["student"].net)
    value, want = Definition(nets, name == "flow", **change).gradient()
    torch.testing.assert_close(loss.double(), value, rtol=1e-4, atol=0)
    assert close(got, want)
    _, base = Definition(nets, name == "flow").gradient()
    assert close(got, base) == (not change)


def test_a_flow_model_has_no_boundary_scaling():
    """x_t - t v is x_t at t = 0 whatever the key says."""
    nets = four_nets(FLOW)
    losses = [
        mlp.loss(make(FLOW, **keys), "student", nets, BATCH, make_rng(), {})[0] for keys in ({}, VP_ONLY)
    ]
    assert torch.equal(*losses)


def test_every_key_has_a_test():
    elsewhere = {"name", "denoising_timesteps", "guidance"}  # the sampler's, below
    assert {field.name for field in fields(Config)} == OVERRIDES.keys() | VP_ONLY.keys() | elsewhere


@pytest.mark.parametrize("target", ["ema", "student"])
def test_only_the_student_learns_and_the_target_is_never_the_teacher(target):
    nets = four_nets(FLOW)
    mlp.loss(make(target=target), "student", nets, BATCH, make_rng(), {})[0].backward()
    assert mlp.with_gradient(nets) == {"student"}
    called = {role: [call.grad for call in net.net.calls] for role, net in nets.items()}
    by_target = (
        {"target": [False], "student": [True]}
        if target == "ema"
        else {"target": [], "student": [False, True]}
    )
    assert called == {"teacher": [False], "critic": [], **by_target}
    assert make(target=target).config.roles.keys() == {"student", "teacher"} | (
        {"target"} if target == "ema" else set()
    )


class WrongAt(mlp.MLP):
    """A student that is off by a constant at one time."""

    def __init__(self, seed: int, at: float) -> None:
        super().__init__(seed)
        self.at = at

    def there(self, model_t: Tensor) -> Tensor:
        return column((model_t - self.at).abs() < 1e-3)

    def forward(self, x_t: Tensor, model_t: Tensor, cond: Cond, call: Call = PLAIN) -> Out:
        out = super().forward(x_t, model_t, cond, call)
        return out._replace(F=out.F + 6.0 * self.there(model_t).to(x_t.dtype))


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
def test_loss_last_shows_what_the_whole_loss_hides(schedule):
    """A student that is wrong in the interval that ends in data, and right in the 49 before it."""
    method, batch, size = make(schedule), mlp.make_batch(500), range(500)
    at = float(schedule.model_t(method.grid[-2]))
    nets, losses, lasts = four_nets(schedule), [], []
    for student in (mlp.MLP(0), WrongAt(0, at)):
        nets["student"] = Denoiser(student, schedule)
        loss, metrics = mlp.loss(method, "student", nets, batch, Rng(0, 0, "student0", size, "cpu"), {})
        total, count = metrics["loss_last"]
        losses.append(loss.item())
        lasts.append(float(total / count))
        assert count == (Rng(0, 0, "student0", size, "cpu").integers(50) == 49).sum()
        assert 3 < count < 20  # of 500
    assert lasts[1] > 1.5 * lasts[0]
    assert losses[0] < losses[1] < 1.05 * losses[0]


def test_without_a_sample_there_loss_last_is_empty():
    nets, rng = four_nets(FLOW), Rng(0, 0, "student0", range(1), "cpu")
    assert rng.integers(50) != 49
    rng = Rng(0, 0, "student0", range(1), "cpu")
    _, metrics = mlp.loss(make(FLOW), "student", nets, mlp.make_batch(1), rng, {})
    assert metrics["loss_last"] == (0, 0)


def test_a_target_that_is_the_student_is_warned_of():
    [line] = make(target="student").warnings()
    assert "method.target = 'ema'" in line
    assert not list(make(target="ema").warnings())


def test_guidance_of_one_is_a_single_call():
    nets = four_nets(FLOW)
    mlp.loss(make(guidance_range=(1.0, 1.0)), "student", nets, BATCH, make_rng(), {})
    (call,) = nets["teacher"].net.calls
    assert torch.equal(call.text, BATCH.cond.text)


# ----------------------------------------------------------------------- flow maps that are known


class Point(mlp.Formula):
    """v or eps of data that are one point, 0.125: every step of the ODE is exact."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def coeffs(self, model_t: Tensor) -> tuple[Tensor, Tensor]:
        t = model_t / 1000 if self.schedule is FLOW else (model_t + 1) / 1000
        return column(self.schedule.alpha(t)), column(self.schedule.sigma(t))

    def F(self, x_t: Tensor, model_t: Tensor) -> Tensor:
        alpha, sigma = self.coeffs(model_t)
        eps = (x_t - alpha * 0.125) / sigma.clamp(min=1e-9)
        return eps - 0.125 if self.schedule is FLOW else eps


class PointMap(Point):
    """The F of an eps model whose f is the end of the ODE at index 0, where some noise is left."""

    def F(self, x_t: Tensor, model_t: Tensor) -> Tensor:
        alpha, sigma = self.coeffs(model_t)
        end_alpha, end_sigma = self.coeffs(torch.zeros_like(model_t))
        end = end_alpha * 0.125 + end_sigma * super().F(x_t, model_t)
        k = 10 * column(model_t)
        x0 = (end - 0.25 / (k**2 + 0.25) * x_t) / (k / (k**2 + 0.25).sqrt()).clamp(min=1e-9)
        return (x_t - alpha * x0) / sigma


def in_float64(batch: Batch) -> Batch:
    assert batch.x0 is not None
    return replace(batch, x0=batch.x0.double())


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
@pytest.mark.parametrize("loss", ["l2", "huber"])
@pytest.mark.parametrize("target", ["ema", "student"])
def test_a_perfect_student_has_no_loss(schedule, loss, target, float64):
    student = Point(schedule) if schedule is FLOW else PointMap(schedule)
    made = {"student": student, "teacher": Point(schedule), "target": student}
    nets = {role: Denoiser(net, schedule) for role, net in made.items()}
    batch = in_float64(mlp.make_batch())
    batch.x0.fill_(0.125)
    method = make(schedule, loss=loss, target=target, guidance_range=(1.0, 1.0))
    for step in range(20):
        value, _ = mlp.loss(method, "student", nets, batch, Rng(0, step, "student0", range(4), "cpu"), {})
        assert value.item() <= 1e-20


class Gaussian(mlp.Formula):
    """v of data N(0, scale^2)."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def F(self, x_t: Tensor, model_t: Tensor) -> Tensor:
        t = column(model_t / 1000)
        return (t - (1 - t) * self.scale**2) / ((1 - t) ** 2 * self.scale**2 + t**2) * x_t


class GaussianMap(Gaussian):
    """F whose x0 is the end of the exact ODE: x scale / sqrt((1 - t)^2 scale^2 + t^2)."""

    def F(self, x_t: Tensor, model_t: Tensor) -> Tensor:
        t = column(model_t / 1000)
        end = x_t * self.scale / ((1 - t) ** 2 * self.scale**2 + t**2).sqrt()
        return (x_t - end) / t.clamp(min=1e-9)


def gaussian_loss(solver_steps: int, scale: float) -> float:
    """Mean l2 loss of the flow map to N(0, scale^2) under the teacher of N(0, 0.25)."""
    made = {"student": GaussianMap(scale), "target": GaussianMap(scale), "teacher": Gaussian(0.5)}
    nets = {role: Denoiser(net, FLOW) for role, net in made.items()}
    method = make(loss="l2", solver_steps=solver_steps, guidance_range=(1.0, 1.0))
    batch = in_float64(mlp.make_batch(500))
    batch.x0.mul_(0.5)
    return mlp.loss(method, "student", nets, batch, Rng(0, 0, "student0", range(500), "cpu"), {})[0].item()


def test_the_fixed_point_is_the_true_flow_map(float64):
    """Its f differs along a step by an Euler step's error, O(1 / N^2); that of another map by O(1 / N)."""
    ratio = {scale: gaussian_loss(50, scale) / gaussian_loss(200, scale) for scale in (0.45, 0.5, 0.55)}
    assert ratio[0.5] > 100 > 2 * max(ratio[0.45], ratio[0.55])  # four times the steps: 4^4 and 4^2


# ------------------------------------------------------------------------------------ its sampler


@pytest.mark.parametrize("embedding", [False, True])
def test_samples_are_those_of_diffusers_lcm_scheduler(embedding, monkeypatch):
    from diffusers import LCMScheduler
    from diffusers.schedulers import scheduling_lcm

    def make_noise() -> Rng:
        return Rng(0, 0, "sample", range(4), "cpu")

    nets, draws = four_nets(VP), make_noise()
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda shape, **_: draws.normal(mlp.SHAPE))
    scheduler: Any = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(4)
    noise = torch.randn(4, *mlp.SHAPE, generator=torch.Generator().manual_seed(1))
    x, w = noise, torch.full((4,), 8.0)
    cond = Cond(BATCH.cond.text, guidance=w if embedding else None)
    with torch.no_grad():
        for t in scheduler.timesteps:
            F = nets["student"].net(x, t.expand(4).float(), cond).F
            x, denoised = scheduler.step(F, t, x, return_dict=False)
        got = make(VP, guidance_embedding=embedding).sample(
            nets, noise, BATCH.cond, BATCH.uncond, make_noise()
        )
    torch.testing.assert_close(got, denoised, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # the keys of the sampler are read
        other = make(VP, guidance_embedding=embedding, guidance=3.0).sample(
            nets, noise, BATCH.cond, BATCH.uncond, make_noise()
        )
        few = make(VP, denoising_timesteps=(1000.0, 500.0)).sample(
            nets, noise, BATCH.cond, BATCH.uncond, make_noise()
        )
    assert torch.allclose(got, other) != embedding
    assert not torch.allclose(got, few)


@pytest.mark.parametrize(
    "change",
    [
        {"denoising_timesteps": (900.0,)},
        {"guidance_range": (4.0, 3.0)},
        {"guidance": 20.0, "guidance_embedding": True},
        {"solver_steps": 0},
        {"huber_c": 0.0},
    ],
    ids=str,
)
def test_problems_name_the_key(change):
    assert [key for key, _ in Config(name="lcm", **BASE | change).problems()] == [next(iter(change))]
    assert not list(Config(name="lcm", **BASE).problems())


def test_one_guidance_is_a_range_and_one_that_is_not_told_may_be_outside():
    assert not list(Config(name="lcm", **BASE | {"guidance_range": (3.0, 3.0), "guidance": 20.0}).problems())
