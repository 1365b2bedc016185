"""Dual-expert consistency (DCM 2506.03123): one student for the noisy times, and one for the rest.

Layout is decided at the noisy times. The grid of N Euler points is sigma_j = S((j + 1) / N), S the schedule's
shift; sigma_prev_j = sigma_{j-1}, and sigma_prev_0 = S(1 / 1000). The semantic expert is trained at
j >= boundary_index, the detail expert below. From sigma_i each jumps in one Euler step to the end sigma_e of
its phase, and learns to land where the teacher's step and its own jump from there land. Flow models:
x_t = (1 - sigma) x0 + sigma eps. B batch; latents [B, C, T, H, W].
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fastdmd.batch import Batch, Cond
from fastdmd.methods import gan
from fastdmd.methods.consistency import Target, huber, last_share, target_warnings
from fastdmd.methods.method import Carry, How, Level, Loss, Method, Nets, Share
from fastdmd.rng import Rng
from fastdmd.sampler import guided, ode
from fastdmd.schedule import Coeffs, FlowSchedule, Schedule, per_sample, send, shift, student_times

Pair = tuple[Tensor, Tensor]  # made, wanted
DETAIL_ONLY = ("detail_timesteps", "adversarial_weight", "hinge_weight", "feature_weight", "disc_layers")


@dataclass(frozen=True, kw_only=True)
class Config:
    uses: ClassVar = ()
    needs_latents: ClassVar = "method 'dcm'"
    guidance_embedding: ClassVar = False
    frames_per_block: ClassVar = None
    flow_only: ClassVar = True

    name: Literal["dcm"]
    expert: Literal["semantic", "detail"]  # detail: the student starts from the semantic one
    guidance: float  # of the teacher's steps, uncond + w (cond - uncond); DCM uses w = 6
    target: Target  # whose jump is learned: the student's average, or the student without gradient
    # of the square error of frame differences; DCM: 1 for the semantic expert, 0 for the detail
    temporal_weight: float
    temporal_lag: int = 3  # latent frames between the two of a difference
    solver_steps: int = 50  # N
    boundary_index: int = 35  # the first point of the semantic expert
    phases: int = 1  # of the whole grid, moved to the expert's first point
    huber_c: float = 1e-3
    semantic_timesteps: tuple[float, ...] = (1000.0, 992.0, 982.0)  # of sampling, 1000 sigma
    detail_timesteps: tuple[float, ...] = (949.0, 905.0, 810.0)
    # of hinge and features together; 0: the detail expert has no discriminator
    adversarial_weight: float = 0.1
    hinge_weight: float = 5.0
    feature_weight: float = 10.0
    disc_layers: tuple[int, ...] | None = None  # blocks of the teacher, from 0; absent: every second, 0 first

    @property
    def points(self) -> range:
        """Return the points of the solver's grid that the expert is trained at."""
        boundary = self.boundary_index
        return range(boundary, self.solver_steps) if self.expert == "semantic" else range(boundary)

    @property
    def adversarial(self) -> bool:
        return self.expert == "detail" and self.adversarial_weight > 0

    @property
    def roles(self) -> Mapping[str, How]:
        roles: dict[str, How] = {"student": "train", "teacher": "frozen"}
        if self.target == "ema":
            roles["target"] = "ema"
        if self.expert == "detail":
            roles["semantic"] = "frozen"
        if self.adversarial:
            roles["disc"] = "heads"
        return roles

    def problems(self) -> Iterator[tuple[str, str]]:
        for key in ("temporal_weight", "adversarial_weight", "hinge_weight", "feature_weight"):
            if getattr(self, key) < 0:
                yield key, f"{getattr(self, key)} is negative; 0 is off"
        for key in ("temporal_lag", "phases"):
            if getattr(self, key) < 1:
                yield key, f"{getattr(self, key)} is not positive; use 1 or more"
        if self.huber_c <= 0:
            yield "huber_c", f"{self.huber_c} is not positive; DCM uses 1e-3"
        N, boundary = self.solver_steps, self.boundary_index
        if not 2 <= N < 1000:
            yield "solver_steps", f"{N} leaves [2, 999]; DCM uses 50"
        elif not 0 < boundary < N:
            yield (
                "boundary_index",
                f"{boundary} is not between 0 and solver_steps = {N}; DCM uses 70 %, {7 * N // 10}",
            )
        elif 1 < self.phases < (least := N // len(self.points) + 1):
            yield (
                "phases",
                f"{self.phases} of the whole grid leave the {self.expert} expert one; use 1, or {least} on",
            )
        for key in ("semantic_timesteps", "detail_timesteps"):
            steps = list(getattr(self, key))
            if not steps or not all(0 < t <= 1000 for t in steps):
                yield key, f"{steps} is empty or leaves (0, 1000]; give 1000 times the noise levels"
            elif (descending := sorted(set(steps), reverse=True)) != steps:
                yield key, f"{steps} does not descend; use {descending}"
            elif key == "semantic_timesteps" and steps[0] != 1000:
                yield key, f"{steps} starts at {steps[0]}; start at 1000, from pure noise"
        if self.disc_layers == ():
            yield "disc_layers", "is empty; leave it out for every second block"
        yield from gan.layer_problems("disc_layers", self.disc_layers or ())
        for field in fields(self) if self.expert == "semantic" else ():
            if field.name in DETAIL_ONLY and getattr(self, field.name) != field.default:
                yield field.name, "is the detail expert's; remove the key"


class Further(NamedTuple):
    """The level sigma_a of the adversarial pair, from that of the pair, sigma_e."""

    c: Coeffs
    n: Tensor  # noise
    keep: Tensor  # (1 - sigma_a) / (1 - sigma_e), [B]
    add: Tensor  # (sigma_a - sigma_e) / (1 - sigma_e), [B]

    def noised(self, z: Tensor) -> Tensor:
        """Return z of sigma_e at sigma_a, where n is z's own noise."""
        return per_sample(self.keep, z) * z + per_sample(self.add, z) * self.n


class Draws(NamedTuple):
    """What a step of DCM draws."""

    level: Level  # sigma
    c_prev: Coeffs  # of sigma_prev
    to_end: Tensor  # sigma_e - sigma, [B]
    to_prev: Tensor  # sigma_prev - sigma, [B]
    prev_to_end: Tensor  # sigma_e - sigma_prev, [B]
    last: Tensor  # 1 where sigma is the expert's last point, else 0, [B]
    adversarial: Further | None


class DCM(Method):
    Config = Config
    renoises = False

    def __init__(self, config: Config, schedule: Schedule) -> None:
        if not isinstance(schedule, FlowSchedule):
            raise ValueError("method.name: 'dcm' is for flow models such as Wan; use another")
        self.config = config
        self.schedule = schedule
        self.guidance = config.guidance
        self.sigmas = solver_sigmas(config.solver_steps, schedule.flow_shift)
        early, late = (
            student_times(t, False, 1.0) for t in (config.semantic_timesteps, config.detail_timesteps)
        )
        boundary = 1000 * float(self.sigmas[config.boundary_index])
        place = f"the boundary, {boundary:.6g} at this flow_shift and boundary_index"
        if 1000 * early[-1] <= boundary:
            raise ValueError(
                f"method.semantic_timesteps: {1000 * early[-1]:.6g} is not above {place}; raise it"
            )
        if config.expert == "semantic":  # alone: the teacher goes on from the boundary
            rest = schedule.solver_grid(config.solver_steps)[-config.boundary_index - 1 :]
            self.times, self.grid = early, torch.cat([early, rest])
            self.sampled = ("student", "teacher")
        elif 1000 * late[0] > boundary:
            raise ValueError(f"method.detail_timesteps: {1000 * late[0]:.6g} is above {place}; lower it")
        else:
            self.times = torch.cat([early, late])
            self.grid = torch.cat([self.times, torch.zeros_like(late[:1])])
            self.sampled = ("semantic", "student")

    def phases(self, step: int) -> tuple[str, ...]:
        return ("student", "disc") if self.config.adversarial else ("student",)

    def warnings(self) -> Iterator[str]:
        """Yield what is known to go wrong with the target."""
        yield from target_warnings(self.config.target)

    def make_heads(self, nets: Nets) -> gan.Heads:
        return gan.make_heads(nets["teacher"], self.layers(nets), "method.disc_layers")

    def layers(self, nets: Nets) -> tuple[int, ...]:
        """Return the teacher's blocks that the discriminator judges by."""
        return self.config.disc_layers or tuple(range(0, len(nets["teacher"].net.widths), 2))

    def draw(self, phase: str, rng: Rng, shape: tuple[int, ...], carry: Carry) -> Draws | None:
        """Draw i uniform over the expert's points, and the adversarial pair's level.

        The disc phase draws nothing.
        """
        if phase == "disc":
            return None
        points, eps = self.config.points, rng.normal(shape)
        i = points.start + rng.integers(len(points))
        e = phase_end(i, self.config.solver_steps, self.config.phases, points.start)
        now, prev, end = self.sigmas[i + 1], self.sigmas[i], self.sigmas[e]
        times = [now, prev]
        rows = [end - now, prev - now, end - prev, (i == points.start).double()]
        if not self.config.adversarial:
            (c, c_prev), lengths = send(self.schedule, times, eps, rows)
            return Draws(Level(c, eps), c_prev, *lengths, adversarial=None)
        j = e + (rng.uniform() * (points.stop - e)).long()  # U{e .. last point}
        judged, n = self.sigmas[j], rng.normal(shape)
        rows += [(1 - judged) / (1 - end), (judged - end) / (1 - end)]
        (c, c_prev, c_judged), (*lengths, keep, add) = send(self.schedule, [*times, judged], eps, rows)
        return Draws(Level(c, eps), c_prev, *lengths, adversarial=Further(c_judged, n, keep, add))

    def loss(self, phase: str, nets: Nets, batch: Batch, draws: Draws | None, carry: Carry) -> Loss:
        """Return the student's loss, or the discriminator's.

        `trains` keeps the discriminator's parameters out of the student's gradient.
        """
        if draws is None:
            return self.disc_loss(nets, batch, carry)
        config = self.config
        pair = self.pair(nets, batch, draws)
        made, wanted = pair
        error = huber(made, wanted, config.huber_c)
        loss = error.mean()
        metrics: dict[str, Tensor | Share] = {"huber": loss.detach()}
        metrics["loss_last"] = last_share(error, draws.last)
        if config.temporal_weight:
            loss = loss + config.temporal_weight * temporal(made, wanted, config.temporal_lag)
        if draws.adversarial is not None:
            hinge, features = self.fooling(nets, pair, batch, draws.adversarial, carry)
            weighted = config.hinge_weight * hinge + config.feature_weight * features
            loss = loss + config.adversarial_weight * weighted
            metrics |= {"hinge": hinge.detach(), "features": features.detach()}
        return loss, metrics

    def pair(self, nets: Nets, batch: Batch, draws: Draws) -> Pair:
        """Return where the student lands and where it should, both at sigma_prev_e.

        The target network is never the teacher, which cannot jump. The last point is of the phase that ends
        last: close to data, at sigma_prev_0, for the detail expert, at the boundary for the semantic one.
        """
        if batch.x0 is None:
            raise ValueError("method 'dcm' trains on latents; the data has prompts only")
        c, x_t = draws.level.c, draws.level.noised(batch.x0)
        made = jump(x_t, nets["student"].raw(x_t, c, batch.cond), draws.to_end)
        with torch.no_grad():
            v = nets["teacher"].guided(x_t, c, batch.cond, batch.uncond, self.guidance)
            x_prev = jump(x_t, v, draws.to_prev)
            target = nets["target" if self.config.target == "ema" else "student"]
            wanted = jump(x_prev, target.raw(x_prev, draws.c_prev, batch.cond), draws.prev_to_end)
        return made, wanted

    def fooling(
        self, nets: Nets, pair: Pair, batch: Batch, further: Further, carry: Carry
    ) -> tuple[Tensor, Tensor]:
        """Return (hinge, feature matching) of the pair noised to sigma_prev_j, with one noise for both."""
        fake, real = (further.noised(z) for z in pair)
        # not the hidden states: those of a large model are gigabytes
        carry["adversarial"] = fake.detach(), real, further.c
        heads = gan.heads(nets)
        layers = self.layers(nets)
        model_t = further.c.model_t
        with torch.no_grad():
            aim, _ = heads(nets["teacher"].features(real, model_t, batch.cond, layers)[1])
        projected, logits = heads(nets["teacher"].features(fake, model_t, batch.cond, layers)[1])
        return gan.hinge_g(logits), gan.feature_matching(projected, aim)

    def disc_loss(self, nets: Nets, batch: Batch, carry: Carry) -> Loss:
        """Return the hinge on the pair that the student's phase of this step made."""
        fake, real, c = carry["adversarial"]
        with torch.no_grad():
            z, cond = torch.cat([fake, real]), batch.cond.cat(batch.cond)
            _, maps = nets["teacher"].features(z, c.model_t.repeat(2), cond, self.layers(nets))
        return gan.hinge_d(*gan.halves(gan.heads(nets)(maps)[1])), {}

    def few_grid(self) -> Tensor:
        """Return the teacher's steps: the student's, where the teacher itself makes the rest of them."""
        return self.grid if self.config.expert == "semantic" else super().few_grid()

    def sample(self, nets: Nets, noise: Tensor, cond: Cond, uncond: Cond, rng: Rng) -> Tensor:
        """Return x0 by Euler steps without guidance, the semantic expert's first.

        Each step goes to the next time of the joined list. Without a detail expert the semantic one is scored
        alone: its last step goes to the boundary, and the guided teacher takes the solver's small steps from
        there to 0.
        """
        if self.config.expert == "semantic":
            early, late = nets["student"], guided(nets["teacher"], uncond, self.guidance)
        else:
            early, late = nets["semantic"], nets["student"]
        handover = len(self.config.semantic_timesteps)
        x = ode(early, self.schedule, noise, self.grid[: handover + 1], cond)
        return ode(late, self.schedule, x, self.grid[handover:], cond)


def solver_sigmas(steps: int, flow_shift: float) -> Tensor:
    """Return float64 [N + 1], ascending: entry j is sigma_prev_j, and entry j + 1 is sigma_j."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    u[0] = 1 / 1000
    return shift(u, flow_shift)


def phase_end(i: Tensor, steps: int, phases: int, offset: int) -> Tensor:
    """Return e(i), int64 [B]: the largest floor(k N / phases) + offset that is not over i."""
    starts = offset + torch.arange(phases) * steps // phases
    return starts[torch.searchsorted(starts, i, right=True) - 1]


def jump(x: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """Return x + length v, one Euler step of sigma_to - sigma = length [B]."""
    return x + per_sample(length, x) * v


def temporal(a: Tensor, b: Tensor, lag: int) -> Tensor:
    """Return the mean square error of the differences of frames `lag` apart."""
    if (frames := a.shape[2]) <= lag:
        raise ValueError(
            f"method.temporal_lag: {lag} is not under the {frames} latent frames; use less, or weight 0"
        )
    error = a - b
    return (error[:, :, lag:] - error[:, :, :-lag]).square().mean()
