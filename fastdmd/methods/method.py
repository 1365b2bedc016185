"""What an objective is. It owns mathematics only: no optimizer, device, checkpoint or `requires_grad`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdmd.batch import Batch, Cond
from fastdmd.denoiser import Denoiser
from fastdmd.rng import Rng
from fastdmd.sampler import guided, ode
from fastdmd.schedule import Coeffs, Schedule, add_noise

# "train" and "frozen" have weights of their own, "ema" follows the student, "heads" start at random
How = Literal["train", "frozen", "ema", "heads"]
TRAINABLE = ("student", "critic", "disc")  # the roles that some method trains
LONGEST = 64  # steps of a cycle
Nets = Mapping[str, Denoiser]
Phases = tuple[str, ...]
Carry = MutableMapping[str, Any]  # what the phases of one step share


class Share(NamedTuple):
    """A metric of some samples of a micro-batch: its sum and their number, perhaps 0; float [] each."""

    total: Tensor
    samples: Tensor


Metrics = Mapping[str, Tensor | Share]  # a Tensor [] is the mean over the micro-batch
Loss = tuple[Tensor, Metrics]


class Sampler(NamedTuple):
    """A way to make samples: the roles whose networks it takes, what it does with them, and its steps."""

    roles: tuple[str, ...]
    run: Callable[[Nets, Tensor, Cond, Cond, Rng], Tensor]  # (nets, noise, cond, uncond, rng) -> x0
    steps: int


class MethodConfig(Protocol):
    """The table [method] of one objective."""

    uses: ClassVar[tuple[str, ...]]  # config tables beside [method]

    @property
    def guidance_embedding(self) -> bool:
        """Return whether the student is conditioned on its guidance."""
        ...

    @property
    def name(self) -> str: ...

    @property
    def roles(self) -> Mapping[str, How]: ...

    @property
    def needs_latents(self) -> str | None:
        """Return which of its settings trains on clean latents, `batch.x0`; None: none does."""
        ...

    @property
    def frames_per_block(self) -> int | None:
        """Return the latent frames of a block, where the student is causal without a rollout."""
        ...

    @property
    def flow_only(self) -> bool:
        """Return whether the mathematics is that of flow models."""
        ...


class Method(ABC):
    """One objective, made from its table, the noise schedule and the tables that it uses.

    Everything random of a phase is in its `draw`, which is made before it on the host; `loss` sees no
    generator, makes no constant on the device and reads nothing back, so that a phase can be captured as one
    graph.
    """

    schedule: Schedule
    times: Any  # Tensor float64 [n], the student's own times, descending; None: it has no few-step sampler
    guidance: float  # of the teacher that the student is made after; 1 is off
    renoises: bool = True  # between its times, as diffusers' LCM scheduler does; else it takes Euler steps
    sampled: tuple[str, ...] = ("student",)  # the roles that `sample` takes

    @abstractmethod
    def phases(self, step: int) -> tuple[str, ...]:
        """Return what step `step` does, in order."""

    def trains(self, phase: str) -> tuple[str, ...]:
        """Return the roles that a phase updates."""
        return (phase,)

    @abstractmethod
    def draw(self, phase: str, rng: Rng, shape: tuple[int, ...], carry: Carry) -> Any:
        """Return all that a phase draws for a micro-batch of latents [B, *shape], with its coefficients."""

    @abstractmethod
    def loss(self, phase: str, nets: Nets, batch: Batch, draws: Any, carry: Carry) -> Loss:
        """Return (loss, metrics) of a micro-batch."""

    def warnings(self) -> Iterator[str]:
        """Yield one line for each choice of the configuration that is allowed and known to go wrong."""
        yield from ()

    def sample(self, nets: Nets, noise: Tensor, cond: Cond, uncond: Cond, rng: Rng) -> Tensor:
        """Return x0 [B, C, ..] by the student's few steps, when it has `times`."""
        raise NotImplementedError

    def samplers(self, steps: int, guidance: float | None) -> dict[str, Sampler]:
        """Return what a run compares at its end, by the names of summary.json.

        They are the student's sampler, the teacher's of `steps` Euler steps, and the teacher's of as many as
        the student takes. guidance: of the teacher; None: the method's own.
        """
        w, few = self.guidance if guidance is None else guidance, self.few_grid()
        return {
            "student": Sampler(self.sampled, self.sample, len(few) - 1),
            "teacher": ode_sampler("teacher", self.schedule, self.schedule.solver_grid(steps), w),
            "teacher_few": ode_sampler("teacher", self.schedule, few, w),
        }

    def few_grid(self) -> Tensor:
        """Return the Euler steps of a teacher with the student's budget, float64 [steps + 1]."""
        return self.schedule.solver_grid(len(self.times))

    def make_heads(self, nets: Nets) -> Any:
        """Return the module of a role with "heads", with random weights; `gan.heads` finds it again."""
        raise NotImplementedError


def cycle(method: Method) -> list[Phases]:
    """Return the phases of each step of a cycle, the shortest that a run repeats."""
    steps = [method.phases(step) for step in range(2 * LONGEST)]
    for length in range(1, LONGEST + 1):
        if all(steps[i] == steps[i % length] for i in range(2 * LONGEST)):
            return steps[:length]
    raise AssertionError(f"no cycle of up to {LONGEST} steps")


def ode_sampler(role: str, schedule: Schedule, grid: Tensor, guidance: float) -> Sampler:
    """Return the sampler of a role's network that takes Euler steps along a grid, under guidance."""

    def run(nets: Nets, noise: Tensor, cond: Cond, uncond: Cond, rng: Rng) -> Tensor:
        return ode(guided(nets[role], uncond, guidance), schedule, noise, grid, cond)

    return Sampler((role,), run, len(grid) - 1)


class Level(NamedTuple):
    """A noise level and the noise of a micro-batch."""

    c: Coeffs
    eps: Tensor  # [B, C, ..]

    def noised(self, x0: Tensor) -> Tensor:
        """Return x0 at this level."""
        return add_noise(x0, self.eps, self.c)


def mean_metrics(micro: Sequence[Metrics]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return each metric's mean over the micro-batches, and for each Share the number of its samples.

    Nothing is read from a device: the mean of a Share without samples is 0, and its number says so.
    """
    means: dict[str, Tensor] = {}
    samples: dict[str, Tensor] = {}
    for name in micro[0]:
        column = [metrics[name] for metrics in micro]
        shares = [value for value in column if isinstance(value, Share)]
        if shares:
            samples[name] = torch.stack([share.samples for share in shares]).sum()
            means[name] = torch.stack([share.total for share in shares]).sum() / samples[name].clamp(min=1)
        else:
            means[name] = torch.stack([value for value in column if isinstance(value, Tensor)]).mean()
    return means, samples
