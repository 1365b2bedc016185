"""Schedules in float64, and the solvers that walk them. B batch."""

import pytest
import torch
from torch import Tensor

from fastdmd.batch import Cond
from fastdmd.sampler import ode
from fastdmd.schedule import (
    Coeffs,
    FlowSchedule,
    Schedule,
    VPSchedule,
    add_noise,
    coeffs,
    send,
    shift,
    student_times,
    unshift,
)

TABLE = torch.cumprod(
    1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0
)  # SDXL's
SCHEDULES = {"flow": FlowSchedule(5.0), "eps": VPSchedule(TABLE, "eps"), "v": VPSchedule(TABLE, "v")}
T = torch.tensor([1.0, 0.7, 0.25, 0.02], dtype=torch.float64)
NOBODY = Cond(torch.zeros(1, 1, 1))


def pair() -> tuple[Tensor, Tensor]:
    x0, eps = torch.randn(2, len(T), 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x0, eps


def alpha_sigma(kind: str) -> tuple[Tensor, Tensor]:
    """By hand, [B, 1]: index n of the table is time (n + 1) / 1000."""
    if kind == "flow":
        return (1 - T)[:, None], T[:, None]
    product = TABLE[[999, 699, 249, 19]][:, None]
    return product.sqrt(), (1 - product).sqrt()


@pytest.mark.parametrize("kind", SCHEDULES)
def test_noising_and_x0_from_the_target(kind):
    schedule, (x0, eps), (alpha, sigma) = SCHEDULES[kind], pair(), alpha_sigma(kind)
    torch.testing.assert_close(schedule.alpha(T)[:, None], alpha, rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.sigma(T)[:, None], sigma, rtol=1e-14, atol=0)
    x_t, c = alpha * x0 + sigma * eps, coeffs(schedule, T, x0.float())
    torch.testing.assert_close(add_noise(x0.float(), eps.float(), c), x_t.float(), rtol=1e-6, atol=1e-6)
    F = {"flow": eps - x0, "eps": eps, "v": alpha * eps - sigma * x0}[kind]
    torch.testing.assert_close(schedule.target(x0.float(), eps.float(), c), F.float(), rtol=1e-6, atol=1e-6)
    a, b = (c[:, None] for c in schedule.x0_coeffs(T))
    torch.testing.assert_close(a * x_t + b * F, x0, rtol=1e-12, atol=1e-12)


def test_what_networks_are_conditioned_on():
    assert SCHEDULES["flow"].model_t(T).tolist() == [1000.0, 700.0, 250.0, 20.0]
    indices = torch.arange(1000, dtype=torch.float64)
    assert torch.equal(SCHEDULES["eps"].model_t((indices + 1) / 1000), indices)
    assert SCHEDULES["v"].model_t(torch.zeros(1, dtype=torch.float64)).item() == 0


def test_unknown_prediction():
    with pytest.raises(ValueError, match="'x0' is not 'eps' or 'v'"):
        VPSchedule(TABLE, "x0")


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_coeffs_are_float32_rows(schedule: Schedule):
    c = coeffs(schedule, T, torch.zeros(1))
    want = [schedule.alpha(T), schedule.sigma(T), *schedule.x0_coeffs(T), schedule.model_t(T)]
    assert (c.skip, c.out) == (None, None)
    for got, exact in zip(c[:5], want, strict=True):
        assert torch.equal(got, exact.float())


def test_coeffs_are_rounded_last():
    """1 - t in float32 would be zero."""
    t = torch.tensor([1 - 1e-9], dtype=torch.float64)
    assert coeffs(SCHEDULES["flow"], t, torch.zeros(1)).alpha.item() == pytest.approx(1e-9, rel=1e-6)


@pytest.mark.parametrize("k", [0.5, 1.0, 5.0, 17.0])
def test_shift_multiplies_the_odds(k):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    s = shift(u, k)
    assert (s[0], s[-1]) == (0, 1)
    odds = u[1:-1] / (1 - u[1:-1])
    torch.testing.assert_close(s[1:-1] / (1 - s[1:-1]), k * odds, rtol=1e-12, atol=0)
    torch.testing.assert_close(unshift(s, k), u, rtol=1e-12, atol=1e-15)


def test_student_times():
    nominal = [1000, 750, 500, 250]
    warped = torch.tensor([1000, 937.5, 2500 / 3, 625], dtype=torch.float64)
    torch.testing.assert_close(1000 * student_times(nominal, True, 5.0), warped, rtol=1e-14, atol=0)
    assert student_times([1000, 757, 522], False, 5.0).tolist() == [1.0, 0.757, 0.522]


def test_solver_grid():
    grid = FlowSchedule(5.0).solver_grid(4)
    assert grid.dtype == torch.float64
    torch.testing.assert_close(grid, torch.tensor([1, 15 / 16, 5 / 6, 5 / 8, 0], dtype=torch.float64))
    assert torch.equal(FlowSchedule(1.0).solver_grid(2), torch.tensor([1, 0.5, 0], dtype=torch.float64))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_ode_step_keeps_the_noise(kind):
    """Euler for flow, DDIM for VP: x' = alpha' x0 + sigma' eps, with the eps that x and x0 imply."""
    (x0, eps), (alpha, sigma) = pair(), alpha_sigma(kind)
    x = alpha[1] * x0 + sigma[1] * eps
    got = ode(lambda x_t, c, cond: x0.float(), SCHEDULES[kind], x.float(), T[1:3], NOBODY)
    torch.testing.assert_close(got, (alpha[2] * x0 + sigma[2] * eps).float(), rtol=1e-5, atol=1e-5)


def test_ode_of_a_gaussian_carries_noise_to_data():
    """Data N(m, s^2): the flow maps x at t = 1 to m + s x; Euler's error halves with the step."""
    m, s, x = 0.7, 0.4, torch.linspace(-2, 2, 9)[:, None]

    def denoise(x_t: Tensor, c: Coeffs, cond: Cond) -> Tensor:
        t = c.sigma[:, None]
        return m + (1 - t) * s**2 * (x_t - (1 - t) * m) / ((1 - t) ** 2 * s**2 + t**2)

    schedule = FlowSchedule(1.0)
    errors = [
        (ode(denoise, schedule, x, schedule.solver_grid(n), NOBODY) - m - s * x).abs().max()
        for n in (50, 100)
    ]
    assert errors[1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_all_coefficients_go_to_the_device_in_one_copy():
    """Of several times, with further numbers behind them: the same as one by one."""
    later, like, row = T / 2, torch.zeros(1), torch.arange(4.0, dtype=torch.float64)
    (now, then), (sent,) = send(SCHEDULES["v"], [T, later], like, [row])
    for got, t in ((now, T), (then, later)):
        want = coeffs(SCHEDULES["v"], t, like)
        assert all(torch.equal(a, b) for a, b in zip(got[:5], want[:5], strict=True))
    assert torch.equal(sent, row.float())
    storages = {x.untyped_storage().data_ptr() for x in (*now[:5], *then[:5], sent)}
    assert len(storages) == 1
    (wide,), _ = send(SCHEDULES["v"], [T], like.double())
    assert wide.alpha.dtype == torch.float64
