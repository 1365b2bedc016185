"""Samplers over a denoiser: re-noising for few-step students, ODE for teachers. Used by validation, `sample` and the
rollout alike. Times are float64 on the host, descending; latents [B, C, ..] float32.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from fastdmd.denoiser import Cond, Denoiser, guide
from fastdmd.rng import Rng
from fastdmd.schedule import Schedule, add_noise, coeffs, per_sample

Denoise = Callable[[Tensor, Tensor, Cond], Tensor]  # (x_t, t, cond) -> x0


def guided(denoiser: Denoiser, uncond: Cond, w: float) -> Denoise:
    """The denoiser under guidance w; x0 is linear in F, so guiding F guides x0."""
    if w == 1:
        return denoiser

    def denoise(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        F_c, F_u = denoiser.raw_pair(x_t, t, cond, uncond)
        return denoiser.x0(x_t, t, guide(F_u, F_c, w))

    return denoise


def renoise_steps(
    denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, steps: int, cond: Cond, rng: Rng
) -> Tensor:
    """x at times[steps], from x at times[0] by `steps` steps x0 = denoise(x), x' = alpha' x0 + sigma' eps."""
    for i in range(steps):
        x0 = denoise(x, times[i].expand(len(x)), cond)
        x = add_noise(schedule, x0, rng.normal(x.shape[1:]), times[i + 1].expand(len(x)))
    return x


def renoise(denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, cond: Cond, rng: Rng) -> Tensor:
    """x0 of a few-step student: re-noising steps down to the last time, then one denoising."""
    x = renoise_steps(denoise, schedule, x, times, len(times) - 1, cond, rng)
    return denoise(x, times[-1].expand(len(x)), cond)


def ode_step(schedule: Schedule, x: Tensor, x0: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """x' = alpha' x0 + sigma' (x - alpha x0) / sigma, from times t to t_next [B]: Euler for flow, DDIM for VP."""
    now, then = coeffs(schedule, t, x), coeffs(schedule, t_next, x)
    ratio = then.sigma / now.sigma
    return torch.addcmul(per_sample(then.alpha - ratio * now.alpha, x) * x0, per_sample(ratio, x), x)


def ode(denoise: Denoise, schedule: Schedule, x: Tensor, grid: Tensor, cond: Cond) -> Tensor:
    """x at the end of grid [steps + 1], by one `ode_step` between neighbours."""
    for t, t_next in pairwise(grid):
        t, t_next = t.expand(len(x)), t_next.expand(len(x))
        x = ode_step(schedule, x, denoise(x, t, cond), t, t_next)
    return x
