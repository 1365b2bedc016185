"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps with t in [0, 1], 1 = pure noise.

Times are float64 [B] on the host and so is all arithmetic on them. A network and a latent see them only as
`Coeffs`: one small float32 tensor that is sent to the device once per call, exact, without a synchronisation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Config:
    flow_shift: float

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.flow_shift <= 0:
            yield "flow_shift", f"{self.flow_shift} is not positive; Wan 2.1 uses 3 or 5, and 1 is off"


class Coeffs(NamedTuple):
    """What one network call needs of its times, [B] each on the device."""

    alpha: Tensor
    sigma: Tensor
    a: Tensor  # x0 = a x_t + b F
    b: Tensor
    model_t: Tensor
    skip: Tensor | None = None  # of a consistency function skip x_t + out x0; absent: it is x0
    out: Tensor | None = None


class Schedule(Protocol):
    @property
    def flow_shift(self) -> float:
        """Return what the times of training and sampling are shifted by; 1 is off."""
        ...

    def solver_grid(self, steps: int) -> Tensor:
        """Return the times of an ODE solver, float64 [steps + 1] from 1 down to the clean end."""
        ...

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def x0_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a, b) of x0 = a x_t + b F, F the raw network output."""
        ...

    def model_t(self, t: Tensor) -> Tensor:
        """Return the times as the network is conditioned on them."""
        ...

    def target(self, x0: Tensor, eps: Tensor, c: Coeffs) -> Tensor:
        """Return the F of a perfect network that knows x0 and eps."""
        ...


def wide(x: Tensor) -> Tensor:
    """Return x in the type of arithmetic around a network: float32, or float64 if x is that already."""
    return x if x.dtype == torch.float64 else x.float()


def coeffs(schedule: Schedule, t: Tensor, like: Tensor) -> Coeffs:
    """Return the coefficients of times float64 [B] on the host, where `like` is and as `wide` as it."""
    (c,), _ = send(schedule, [t], like)
    return c


def send(
    schedule: Schedule, times: Sequence[Tensor], like: Tensor, rows: Sequence[Tensor] = ()
) -> tuple[list[Coeffs], list[Tensor]]:
    """Return the coefficients of each of `times`, and `rows` of further numbers, by one copy to the device.

    times, rows: float64 [B] on the host. What is returned is where `like` is, and as `wide` as it.
    """
    groups = [
        (schedule.alpha(t), schedule.sigma(t), *schedule.x0_coeffs(t), schedule.model_t(t)) for t in times
    ]
    host = [row.expand(t.shape) for t, group in zip(times, groups, strict=True) for row in group]
    sent = torch.stack([*host, *rows]).to(wide(like).dtype).to(like.device, non_blocking=True).unbind()
    n = len(Coeffs._fields) - len(Coeffs._field_defaults)
    return [Coeffs(*sent[n * i : n * i + n]) for i in range(len(times))], list(sent[n * len(times) :])


def per_sample(c: Tensor, x: Tensor) -> Tensor:
    """Return c [B] as [B, 1, ..], to multiply x [B, ..]."""
    return c.view(-1, *[1] * (x.ndim - 1))


def add_noise(x0: Tensor, eps: Tensor, c: Coeffs) -> Tensor:
    """Return x_t = alpha x0 + sigma eps, float32 [B, ..]."""
    return per_sample(c.alpha, x0) * x0 + per_sample(c.sigma, x0) * eps


class FlowSchedule:
    """Rectified flow: alpha = 1 - t, sigma = t, F = v = eps - x0, so x0 = x_t - t F."""

    def __init__(self, flow_shift: float) -> None:
        self.flow_shift = flow_shift

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def x0_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), -t

    def model_t(self, t: Tensor) -> Tensor:
        return 1000 * t

    def target(self, x0: Tensor, eps: Tensor, c: Coeffs) -> Tensor:
        return eps - x0

    def solver_grid(self, steps: int) -> Tensor:
        """Return the shifted times of an ODE solver, float64 [steps + 1] from 1 to 0."""
        return shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), self.flow_shift)


class VPSchedule:
    """Variance preserving, from a table of `alphas_cumprod`; its times are never shifted.

    Index n of 1,000 is time (n + 1) / 1000, and time 0 is index 0 too: the clean end, as diffusers' DDIM
    without `set_alpha_to_one`.
    prediction "eps": F = eps, x0 = (x_t - sigma F) / alpha.
    prediction "v": F = alpha eps - sigma x0, x0 = alpha x_t - sigma F.
    """

    flow_shift = 1.0

    def __init__(self, alphas_cumprod: Sequence[float] | Tensor, prediction: str) -> None:
        if prediction not in ("eps", "v"):
            raise ValueError(f"prediction {prediction!r} is not 'eps' or 'v'")
        self.alphas_cumprod = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
        self.prediction = prediction

    def model_t(self, t: Tensor) -> Tensor:
        """Return the index into the table, rounded to the nearest."""
        n = len(self.alphas_cumprod)
        return (t * n - 1).round().clamp(0, n - 1)

    def alpha(self, t: Tensor) -> Tensor:
        return self.alphas_cumprod[self.model_t(t).long()].sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alphas_cumprod[self.model_t(t).long()]).sqrt()

    def x0_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha(t), self.sigma(t)
        return (1 / alpha, -sigma / alpha) if self.prediction == "eps" else (alpha, -sigma)

    def target(self, x0: Tensor, eps: Tensor, c: Coeffs) -> Tensor:
        if self.prediction == "eps":
            return eps
        return per_sample(c.alpha, x0) * eps - per_sample(c.sigma, x0) * x0

    def solver_grid(self, steps: int) -> Tensor:
        """Return the times of a DDIM solver, float64 [steps + 1] from 1 to 0: n / steps for n = steps .. 0.

        Their indices are 1000 n / steps - 1, LCM's t_n, rounded where steps do not divide 1,000. Time 0 has
        no index of its own and takes the first: a solver ends at alphas_cumprod[0], slightly noisy, and not
        at alpha 1. Where steps divide, it is diffusers' grid of `timestep_spacing = "trailing"`,
        `set_alpha_to_one = False`.
        """
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def shift(u: Tensor, k: float) -> Tensor:
    """Return sigma(u) = k u / (1 + (k - 1) u): k > 1 moves times toward noise."""
    return k * u / (1 + (k - 1) * u)


def unshift(s: Tensor, k: float) -> Tensor:
    """Return the u with shift(u, k) = s."""
    return s / (k - (k - 1) * s)


def student_times(timesteps: Sequence[float], warp: bool, flow_shift: float) -> Tensor:
    """Return the student's times, float64 [n] descending, from model timesteps in (0, 1000].

    `warp`: the list is nominal and goes through the shift: [1000, 750, 500, 250] at shift 5 becomes
    [1000, 937.5, 833.333, 625].
    """
    t = torch.tensor(timesteps, dtype=torch.float64) / 1000
    return shift(t, flow_shift) if warp else t


def timestep_problems(timesteps: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for what is wrong with a student's `denoising_timesteps`."""
    steps = [int(t) if float(t).is_integer() else t for t in timesteps]
    if not steps:
        yield "denoising_timesteps", "is empty; e.g. [1000, 757, 522]"
    elif not all(0 < t <= 1000 for t in steps):
        yield (
            "denoising_timesteps",
            f"{steps} leaves (0, 1000]; give 1000 times the noise levels, e.g. [1000, 757, 522]",
        )
    elif sorted(set(steps), reverse=True) != steps:
        yield "denoising_timesteps", f"{steps} does not descend; use {sorted(set(steps), reverse=True)}"
    elif steps[0] != 1000:
        yield "denoising_timesteps", f"{steps} starts at {steps[0]}; start at 1000, from pure noise"
