"""Samplers over a denoiser: re-noising for few-step students, ODE for teachers.

Validation, `sample` and the rollout all use them. Times are float64 on the host, descending; latents
[B, C, ..] float32.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastdmd.batch import Cond
from fastdmd.denoiser import Denoiser
from fastdmd.rng import Rng
from fastdmd.schedule import Coeffs, Schedule, add_noise, per_sample, send

Denoise = Callable[[Tensor, Coeffs, Cond], Tensor]  # (x_t, coefficients of t, cond) -> x0


def walk(schedule: Schedule, times: Tensor, x: Tensor) -> list[Coeffs]:
    """Return the coefficients of each of times [n] for all samples of x [B, ..].

    They are sent by one copy to the device.
    """
    steps, _ = send(schedule, [t.expand(len(x)) for t in times], x)
    return steps


def guided(denoiser: Denoiser, uncond: Cond, w: float) -> Denoise:
    """Return the denoiser under guidance w; x0 is linear in F, so guiding F guides x0."""
    if w == 1:
        return denoiser

    def denoise(x_t: Tensor, c: Coeffs, cond: Cond) -> Tensor:
        return denoiser.x0(x_t, c, denoiser.guided(x_t, c, cond, uncond, w))

    return denoise


def renoise_steps(
    denoise: Denoise, x: Tensor, steps: Sequence[Coeffs], noise: Sequence[Tensor], cond: Cond
) -> Tensor:
    """Return x at the last of `steps`, from x at the first: x0 = denoise(x), x' = alpha' x0 + sigma' eps.

    noise: eps of each step but the first.
    """
    for (c, c_next), eps in zip(pairwise(steps), noise, strict=True):
        x = add_noise(denoise(x, c, cond), eps, c_next)
    return x


def renoise(denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, cond: Cond, rng: Rng) -> Tensor:
    """Return x0 of a few-step student: re-noising steps down to the last time, then one denoising."""
    return renoise_along(denoise, x, walk(schedule, times, x), cond, rng)


def renoise_along(denoise: Denoise, x: Tensor, steps: Sequence[Coeffs], cond: Cond, rng: Rng) -> Tensor:
    """Return what `renoise` does, from the coefficients of its times."""
    noise = [rng.normal(x.shape[1:]) for _ in steps[1:]]
    return denoise(renoise_steps(denoise, x, steps, noise, cond), steps[-1], cond)


def ode_step(x: Tensor, x0: Tensor, now: Coeffs, then: Coeffs) -> Tensor:
    """Return x' = alpha' x0 + sigma' (x - alpha x0) / sigma: Euler for flow models, DDIM for VP."""
    ratio = then.sigma / now.sigma
    return torch.addcmul(per_sample(then.alpha - ratio * now.alpha, x) * x0, per_sample(ratio, x), x)


def ode(denoise: Denoise, schedule: Schedule, x: Tensor, grid: Tensor, cond: Cond) -> Tensor:
    """Return x at the end of grid [steps + 1], by one `ode_step` between neighbours."""
    for now, then in pairwise(walk(schedule, grid, x)):
        x = ode_step(x, denoise(x, now, cond), now, then)
    return x
