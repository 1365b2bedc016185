"""Latent consistency distillation (LCM 2310.04378; LCM-LoRA 2311.05556), for eps, v and flow models.

The student f(z, t) is made constant along a step of the teacher's guided ODE, from a grid time t to the next
one t': loss = d(f(z, t, w), sg(f_target(z', t', w))), w ~ U[guidance_range]. B batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fastdmd.batch import Batch, Cond
from fastdmd.denoiser import Denoiser
from fastdmd.methods.consistency import Distance, Target, errors, last_share, target_warnings
from fastdmd.methods.method import Carry, How, Level, Loss, Method, Nets
from fastdmd.rng import Rng
from fastdmd.sampler import ode_step, renoise_along
from fastdmd.schedule import (
    Coeffs,
    FlowSchedule,
    Schedule,
    per_sample,
    send,
    student_times,
    timestep_problems,
)

SIGMA_DATA = 0.5


@dataclass(frozen=True, kw_only=True)
class Config:
    uses: ClassVar = ()
    needs_latents: ClassVar = "method 'lcm'"
    frames_per_block: ClassVar = None
    flow_only: ClassVar = False

    name: Literal["lcm"]
    denoising_timesteps: tuple[float, ...]  # the student's steps, 1000 t; index n of SDXL is n + 1
    guidance_range: tuple[float, float]  # of the teacher's steps, uncond + w (cond - uncond)
    # w of the student's samples, where it is conditioned on it, and of the teacher that it is compared with
    guidance: float
    target: Target = "ema"  # "student": the same network, as LCM-LoRA has it; it drifts
    guidance_embedding: bool = False  # the student is conditioned on w
    solver_steps: int = 50  # of the teacher's grid
    loss: Distance = "huber"
    huber_c: float = 1e-3
    boundary_timestep_scaling: float = 10.0  # eps and v models

    @property
    def roles(self) -> Mapping[str, How]:
        roles: dict[str, How] = {"student": "train", "teacher": "frozen"}
        if self.target == "ema":
            roles["target"] = "ema"
        return roles

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


class Draws(NamedTuple):
    """What a step of consistency distillation draws."""

    level: Level  # t, on the teacher's grid
    then: Coeffs  # of t', the next time on the grid
    w: Tensor  # guidance of the teacher's step, [B]
    last: Tensor  # 1 where t' is the clean end, else 0, [B]


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

    def draw(self, phase: str, rng: Rng, shape: tuple[int, ...], carry: Carry) -> Draws:
        n = rng.integers(self.config.solver_steps)
        low, high = self.config.guidance_range
        w, eps = low + (high - low) * rng.uniform(), rng.normal(shape)
        last = (n == self.config.solver_steps - 1).double()
        (now, then), (w, last) = self.points([self.grid[n], self.grid[n + 1]], eps, [w, last])
        return Draws(Level(now, eps), then, w, last)

    def loss(self, phase: str, nets: Nets, batch: Batch, draws: Draws, carry: Carry) -> Loss:
        if batch.x0 is None:
            raise ValueError("method 'lcm' trains on latents; the data has prompts only")
        now = draws.level.c
        then = draws.then
        w = draws.w
        z, cond = draws.level.noised(batch.x0), self.with_guidance(batch.cond, w)
        with torch.no_grad():
            z_next = ode_step(z, self.teacher_x0(nets["teacher"], z, now, batch, w), now, then)
            target = nets["target" if self.config.target == "ema" else "student"]
            wanted = self.consistency(target, z_next, then, cond)
        made = self.consistency(nets["student"], z, now, cond)
        error = errors(self.config.loss, made, wanted, self.config.huber_c)
        return error.mean(), {"loss_last": last_share(error, draws.last)}

    def sample(self, nets: Nets, noise: Tensor, cond: Cond, uncond: Cond, rng: Rng) -> Tensor:
        """Return x0 by multi-step consistency sampling (algorithm 3)."""
        w = torch.full((len(noise),), self.guidance, dtype=torch.float64)
        steps, (w,) = self.points([t.expand(len(noise)) for t in self.times], noise, [w])

        def denoise(x_t: Tensor, c: Coeffs, cond: Cond) -> Tensor:
            return self.consistency(nets["student"], x_t, c, cond)

        return renoise_along(denoise, noise, steps, self.with_guidance(cond, w), rng)

    def teacher_x0(self, teacher: Denoiser, z: Tensor, c: Coeffs, batch: Batch, w: Tensor) -> Tensor:
        """Return x0 guided with w [B]; without the other side where w is always 1."""
        off = self.config.guidance_range == (1, 1)
        return teacher.x0(z, c, teacher.guided(z, c, batch.cond, batch.uncond, 1.0 if off else w))

    def points(
        self, times: Sequence[Tensor], like: Tensor, rows: Sequence[Tensor]
    ) -> tuple[list[Coeffs], list[Tensor]]:
        """Return the coefficients of times float64 [B], with the boundary condition's, and `rows` [B].

        c_skip = d^2 / ((k n)^2 + d^2), c_out = k n / sqrt((k n)^2 + d^2) (eq. 9), n the timestep index, k
        `boundary_timestep_scaling`, d = 0.5. A flow model's x0 = z - t v is z at t = 0 already.
        """
        if isinstance(self.schedule, FlowSchedule):
            return send(self.schedule, times, like, rows)
        edges: list[Tensor] = []
        variance = SIGMA_DATA**2
        for t in times:
            scaled = self.config.boundary_timestep_scaling * self.schedule.model_t(t)
            edges += [variance / (scaled**2 + variance), scaled / (scaled**2 + variance).sqrt()]
        points, sent = send(self.schedule, times, like, [*edges, *rows])
        edges, rows = sent[: len(edges)], sent[len(edges) :]
        pairs = zip(points, edges[::2], edges[1::2], strict=True)
        return [c._replace(skip=skip, out=out) for c, skip, out in pairs], rows

    def consistency(self, net: Denoiser, z: Tensor, c: Coeffs, cond: Cond) -> Tensor:
        """Return f = c_skip z + c_out x0 (eq. 9), which is z at t = 0."""
        x0 = net(z, c, cond)
        if c.skip is None or c.out is None:
            return x0
        return per_sample(c.skip, z) * z + per_sample(c.out, z) * x0

    def with_guidance(self, cond: Cond, w: Tensor) -> Cond:
        """Return the condition of student and target, with w [B] if they have an embedding of it."""
        return replace(cond, guidance=w.float()) if self.config.guidance_embedding else cond
