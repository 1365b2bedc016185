"""Backward simulation: the student's own few steps, up to a random exit (DMD2 2405.14867, section 4.5)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastdmd.denoiser import Batch, Denoiser
from fastdmd.rng import Rng
from fastdmd.sampler import renoise_steps
from fastdmd.schedule import add_noise


@dataclass(frozen=True, kw_only=True)
class Config:
    mode: Literal["bidirectional", "causal", "data"] = "bidirectional"
    exit: Literal["uniform", "last"] = "uniform"
    grad_frames: int | None = None  # latent frames at the end that carry the loss; absent: all
    frames_per_block: int | None = None

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.grad_frames is not None and self.grad_frames < 1:
            yield "grad_frames", f"{self.grad_frames} is not positive; leave it out to use all frames"
        if self.frames_per_block is not None and self.frames_per_block < 1:
            yield "frames_per_block", f"{self.frames_per_block} is not positive; Self-Forcing uses 3"
        if self.mode == "causal":
            yield "mode", "'causal' is not built yet; use 'bidirectional' or 'data'"
        elif self.frames_per_block is not None:
            yield "frames_per_block", "only mode = 'causal' has blocks; remove the key"


class Rollout(NamedTuple):
    x0_g: Tensor  # student output at the exit step, float32 [B, C, ..]
    exit_t: float  # the exit step's time
    next_t: float  # the next step's time, 0 after the last

    def detach(self) -> "Rollout":
        return self._replace(x0_g=self.x0_g.detach())


def rollout(student: Denoiser, batch: Batch, times: Tensor, config: Config, rng: Rng, grad: bool) -> Rollout:
    """Draw the exit step e, the same on all ranks; walk steps 0 .. e - 1 without gradient; denoise once at e.

    Steps past e never run. Gradient, if any, only through the exit step. Mode "data" noises a data latent to the exit
    time in place of the walk. times: float64 [n] descending.
    """
    B, schedule = len(batch.cond.text), student.schedule
    e = len(times) - 1 if config.exit == "last" else rng.shared_integer(len(times))
    t = times[e].expand(B)
    with torch.no_grad():
        eps = rng.normal(batch.latent_shape)
        if config.mode == "data":
            if batch.x0 is None:
                raise ValueError("rollout.mode = 'data' needs data with latents; use 'bidirectional'")
            x_t = add_noise(schedule, batch.x0, eps, t)
        else:
            x_t = renoise_steps(student, schedule, eps, times, e, batch.cond, rng)
    with torch.set_grad_enabled(grad):
        x0_g = student(x_t, t, batch.cond)
    return Rollout(x0_g, float(times[e]), float(times[e + 1]) if e + 1 < len(times) else 0.0)
