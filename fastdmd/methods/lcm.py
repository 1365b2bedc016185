"""Latent consistency distillation (LCM 2310.04378; LCM-LoRA 2311.05556), for eps, v and flow models.

The student f(z, t) is made constant along a step of the teacher's guided ODE, from a grid time t to the next one t':
loss = d(f(z, t, w), sg(f_target(z', t', w))), w ~ U[guidance_range]. B batch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastdmd.denoiser import Batch, Cond, Denoiser, guide
from fastdmd.methods.consistency import Distance, Target, errors, last_share, target_warnings
from fastdmd.methods.method import Carry, Loss, Method, Nets, Role
from fastdmd.rng import Rng
from fastdmd.sampler import ode_step, renoise
from fastdmd.schedule import FlowSchedule, Schedule, add_noise, per_sample, student_times, timestep_problems, wide

SIGMA_DATA = 0.5


@dataclass(frozen=True, kw_only=True)
class Config:
    uses: ClassVar = ()
    needs_latents: ClassVar = True

    name: Literal["lcm"]
    denoising_timesteps: tuple[float, ...]  # the student's steps, 1000 t; index n of SDXL is n + 1
    guidance_range: tuple[float, float]  # of the teacher's steps, uncond + w (cond - uncond)
    guidance: float  # w of the student's samples, where it is told, and of the teacher that it is compared with
    target: Target = "ema"  # "student": the same network, as LCM-LoRA has it; it drifts
    guidance_embedding: bool = False  # the student is told w
    solver_steps: int = 50  # of the teacher's grid
    loss: Distance = "huber"
    huber_c: float = 1e-3
    boundary_timestep_scaling: float = 10.0  # eps and v models

    @property
    def roles(self) -> Mapping[str, Role]:
        found: dict[str, Role] = {"student": "train", "teacher": "frozen"}
        if self.target == "ema":
            found["target"] = "ema"
        return found

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from timestep_problems(self.denoising_timesteps)
        low, high = self.guidance_range
        if low > high:
            yield "guidance_range", f"[{low}, {high}] descends; use [{high}, {low}]"
        elif self.guidance_embedding and not low <= self.guidance <= high:
            yield (
                "guidance",
                f"{self.guidance} is outside of guidance_range = [{low}, {high}], which the student learns",
            )
        if self.solver_steps < 1:
            yield "solver_steps", f"{self.solver_steps} is not positive; LCM uses 50"
        if self.huber_c <= 0:
            yield "huber_c", f"{self.huber_c} is not positive; LCM uses 1e-3"


class LCM(Method):
    Config = Config

    def __init__(self, config: Config, schedule: Schedule) -> None:
        self.config, self.schedule = config, schedule
        self.guidance = config.guidance
        self.times = student_times(config.denoising_timesteps, False, schedule.flow_shift)
        self.grid = schedule.solver_grid(config.solver_steps)

    def phases(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def warnings(self) -> Iterator[str]:
        """Yield what is known to go wrong with the target."""
        yield from target_warnings(self.config.target)

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, carry: Carry) -> Loss:
        if batch.x0 is None:
            raise ValueError("method 'lcm' trains on latents; the data has prompts only")
        n, (low, high) = rng.integers(self.config.solver_steps), self.config.guidance_range
        t, t_next = self.grid[n], self.grid[n + 1]
        w = low + (high - low) * rng.uniform()
        z = add_noise(self.schedule, batch.x0, rng.normal(batch.latent_shape), t)
        with torch.no_grad():
            z_next = ode_step(self.schedule, z, self.teacher_x0(nets["teacher"], z, t, batch, w), t, t_next)
            target = nets["target" if self.config.target == "ema" else "student"]
            wanted = self.consistency(target, z_next, t_next, self.told(batch.cond, w))
        made = self.consistency(nets["student"], z, t, self.told(batch.cond, w))
        error = errors(self.config.loss, made, wanted, self.config.huber_c)
        return error.mean(), {"loss_last": last_share(error, n == self.config.solver_steps - 1)}

    def sample(self, nets: Nets, noise: Tensor, cond: Cond, uncond: Cond, rng: Rng) -> Tensor:
        """Multi-step consistency sampling (algorithm 3)."""
        told = self.told(cond, torch.full((len(noise),), self.guidance, dtype=torch.float64))

        def denoise(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return self.consistency(nets["student"], x_t, t, cond)

        return renoise(denoise, self.schedule, noise, self.times, told, rng)

    def teacher_x0(self, teacher: Denoiser, z: Tensor, t: Tensor, batch: Batch, w: Tensor) -> Tensor:
        """Guided x0 with w [B]; without the other side where w is always 1."""
        if self.config.guidance_range == (1, 1):
            return teacher(z, t, batch.cond)
        F_c, F_u = teacher.raw_pair(z, t, batch.cond, batch.uncond)
        return teacher.x0(z, t, guide(F_u, F_c, per_sample(w.to(z), z)))

    def consistency(self, net: Denoiser, z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """f = c_skip z + c_out x0 (eq. 9), which is z at t = 0; a flow model's x0 = z - t v is that already.

        c_skip = d^2 / ((k n)^2 + d^2), c_out = k n / sqrt((k n)^2 + d^2), n the timestep index, k
        `boundary_timestep_scaling`, d = 0.5.
        """
        x0 = net(z, t, cond)
        if isinstance(self.schedule, FlowSchedule):
            return x0
        scaled, variance = self.config.boundary_timestep_scaling * self.schedule.model_t(t), SIGMA_DATA**2
        c_skip, c_out = variance / (scaled**2 + variance), scaled / (scaled**2 + variance).sqrt()
        c_skip, c_out = (per_sample(c.to(wide(z)), z) for c in (c_skip, c_out))
        return c_skip * z + c_out * x0

    def told(self, cond: Cond, w: Tensor) -> Cond:
        """The condition of student and target, w [B] with it if it has an embedding."""
        return replace(cond, guidance=w.float().to(cond.text.device)) if self.config.guidance_embedding else cond
