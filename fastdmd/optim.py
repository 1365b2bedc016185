"""Optimizers with float32 master weights, learning-rate schedules, clipping by the global norm, EMA."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastdmd import adamw8bit
from fastdmd.stochastic import StochasticAdamW


@dataclass(frozen=True, kw_only=True)
class Config:
    """One [optim.ROLE] table. The learning rate decides the result, so it has no default."""

    lr: float
    name: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit: moments of a quarter of the bytes, by torchao
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    grad_clip_norm: float = 1.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    min_lr: float = 0.0

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.lr <= 0:
            yield (
                "lr",
                f"{self.lr} is not positive; DMD2 on Wan uses 2e-6 for the student, 4e-7 for the critic",
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            yield "betas", f"{list(self.betas)} leaves [0, 1); e.g. [0.0, 0.999]"
        if self.eps <= 0:
            yield "eps", f"{self.eps} is not positive; e.g. 1e-8"
        if self.weight_decay < 0:
            yield "weight_decay", f"{self.weight_decay} is negative; 0 is off"
        if self.grad_clip_norm <= 0:
            yield "grad_clip_norm", f"{self.grad_clip_norm} is not positive; 1e9 never clips"
        if self.warmup_steps < 0:
            yield "warmup_steps", f"{self.warmup_steps} is negative; 0 is off"
        if not 0 <= self.min_lr <= max(self.lr, 0):
            yield "min_lr", f"{self.min_lr} is not between 0 and lr = {self.lr}; use a value between them"


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    decay: float
    start_step: int = 0
    every: int = 1  # updates of the student between updates of the shadow

    def problems(self) -> Iterator[tuple[str, str]]:
        if not 0 < self.decay < 1:
            yield "decay", f"{self.decay} leaves (0, 1); Self-Forcing uses 0.99"
        if self.start_step < 0:
            yield "start_step", f"{self.start_step} is negative; 0 starts at once"
        if self.every < 1:
            yield "every", f"{self.every} is not positive; 1 follows every update of the student"


Form = tuple[torch.Size, torch.dtype]
MOMENTS = ("exp_avg", "exp_avg_sq")


def forms(x: Tensor) -> Form:
    """Return the shape and the dtype of a tensor."""
    return x.shape, x.dtype


def lr_at(config: Config, step: int, max_steps: int) -> float:
    """Return the learning rate of step `step` (0-based).

    After a linear warm-up it is constant, or a cosine to min_lr at max_steps.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def key_of(kind: str, part: str) -> str:
    """Return what a part of a kind of moment is called."""
    return f"{kind}_{part}" if part else kind


def on_gradient(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call a hook whenever a parameter's gradient has been accumulated, whether or not it learns now."""
    learns = parameter.requires_grad
    parameter.requires_grad_(True)  # a hook cannot be put on another, and stays when this ends
    handle = parameter.register_post_accumulate_grad_hook(hook)
    parameter.requires_grad_(learns)
    return handle


class Optimizer:
    """AdamW, fused or with moments of 8 bits, over float32 masters of a network's parameters.

    A float32 parameter is its own master; for a parameter that was rounded to bfloat16, `masters` holds what
    it was. Plain bfloat16 AdamW at 1e-5 leaves 84-94 % of the weights bit-identical after 100 steps: where
    bfloat16 parameters are their own masters, updates are rounded at random.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        config: Config,
        max_steps: int,
        masters: Mapping[str, Tensor],
        seed: int | None = None,
    ) -> None:
        """seed: of random roundings, where bfloat16 parameters have no masters."""
        self.config = config
        self.seed = seed
        self.max_steps = max_steps
        self.params = params
        self.masters = {name: masters.get(name, p) for name, p in self.params.items()}
        for master in self.masters.values():
            if master.dtype != torch.float32:
                master.grad_dtype = torch.float32  # gradients of micro-batches add up
        self.adamw = self._make()
        self.hooks = [on_gradient(p, partial(self._take, name)) for name, p in self._rounded()]

    def _make(self) -> torch.optim.Optimizer:
        """Return torch's optimizer, torchao's or ours; torch's on the meta device, where it takes no step."""
        is_meta = any(master.is_meta for master in self.masters.values())
        c = self.config
        if self.seed is not None and not is_meta:
            return StochasticAdamW(self.masters.values(), c.lr, c.betas, c.eps, c.weight_decay, self.seed)
        if c.name == "adamw8bit" and not is_meta:
            return adamw8bit.make(self.masters.values(), c.lr, c.betas, c.eps, c.weight_decay)
        return torch.optim.AdamW(
            self.masters.values(), c.lr, c.betas, c.eps, c.weight_decay, fused=not is_meta
        )

    def accumulate(self, name: str, grad: Tensor) -> None:
        """Add a micro-batch's gradient to the master's, in float32: in bfloat16 64 of them lose 0.8 %.

        A hook calls it after each backward; a captured phase returns its gradients, and calls it with them.
        """
        master = self.masters[name]
        if master.grad is None:
            master.grad = grad.to(torch.float32)
        else:
            master.grad.add_(grad)

    def _take(self, name: str, parameter: Tensor) -> None:
        """Move a rounded parameter's gradient to its master, and free it."""
        assert parameter.grad is not None
        self.accumulate(name, parameter.grad)
        parameter.grad = None

    def grads(self) -> dict[str, Tensor]:
        """Return the accumulated gradients by name, of the parameters that have one."""
        return {name: m.grad for name, m in self.masters.items() if m.grad is not None}

    def clip(self) -> Tensor:
        """Scale the gradients to the clip norm, and return their global L2 norm before that, float32 [].

        Under a norm that is not finite they stay as they are: a dump can tell whose fault it was.
        """
        grads = list(self.grads().values())
        norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]).norm()
        scale = (self.config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, torch.where(norm.isfinite(), scale, 1.0))  # pyright: ignore[reportPrivateImportUsage]
        return norm

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update with the clipped gradients and drop them."""
        lr = lr_at(self.config, step, self.max_steps)
        for group in self.adamw.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if isinstance(self.adamw, StochasticAdamW):
            self.adamw.now = step
        self.adamw.step()
        self.adamw.zero_grad()
        self.round()

    def round(self) -> None:
        """Bring the network's rounded parameters up to their masters."""
        for name, p in self._rounded():
            p.data.copy_(self.masters[name])

    def _rounded(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.params.items() if self.masters[name] is not p)

    def moments(self) -> dict[str, Tensor]:
        """Return AdamW's state by "kind.parameter", a moment in codes by "kind_part.parameter"."""
        return {
            f"{key_of(kind, part)}.{name}": value
            for name, master in self.masters.items()
            for kind, moment in self.adamw.state[master].items()
            for part, value in adamw8bit.parts_of(moment).items()
        }

    def part_forms(self, master: Tensor) -> dict[str, Form]:
        """Return the shape and dtype of each part of a master's moments."""
        if self.config.name == "adamw8bit":
            return adamw8bit.part_forms(master)
        return {"": (master.shape, torch.float32)}

    def moment_bytes(self) -> int:
        """Return the bytes of all moments, once each parameter has had a gradient."""
        forms_of = [form for m in self.masters.values() for form in self.part_forms(m).values()]
        return len(MOMENTS) * sum(math.prod(shape) * dtype.itemsize for shape, dtype in forms_of)

    def moment_forms(self, given: Iterable[str]) -> dict[str, Form]:
        """Return the shapes and dtypes of `moments`.

        It is of every parameter that has a name among the given: one that never had a gradient has no state.
        """
        moved = {name.partition(".")[2] for name in given}
        wanted: dict[str, Form] = {}
        for name, master in self.masters.items():
            if name in moved:
                for kind in MOMENTS:
                    parts = self.part_forms(master)
                    wanted |= {f"{key_of(kind, part)}.{name}": form for part, form in parts.items()}
                wanted[f"step.{name}"] = (torch.Size(), torch.float32)
        return wanted

    @torch.no_grad()
    def load(self, masters: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Read back masters and moments; the network follows."""
        for name, master in self.masters.items():
            master.copy_(masters[name])
        for name in {key.partition(".")[2] for key in moments}:
            master = self.masters[name]
            for kind in MOMENTS:
                parts = {
                    part: moments[f"{key_of(kind, part)}.{name}"].to(master.device, copy=True)
                    for part in self.part_forms(master)
                }
                self.adamw.state[master][kind] = adamw8bit.joined(parts, signed=kind == "exp_avg")
            # torchao counts on the host: a power of beta that a GPU takes may be rounded otherwise
            device = "cpu" if self.config.name == "adamw8bit" else master.device
            self.adamw.state[master]["step"] = moments[f"step.{name}"].to(device, copy=True)
        self.round()


class EMA:
    """A float32 shadow of the student's masters.

    It is a copy until start_step, then shadow += (1 - decay) (master - shadow). It moves with the student's
    updates, not with the run's steps: five critic updates between two of the student would make a decay of
    0.99 one of 0.951.
    """

    def __init__(self, masters: Mapping[str, Tensor], config: EMAConfig) -> None:
        self.config = config
        self.masters = masters
        self.updates = 0
        self.shadow = {name: m.detach().to(torch.float32, copy=True) for name, m in masters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow an update of the student in step `step` (1-based count of finished steps)."""
        self.updates += 1
        copy = step <= self.config.start_step
        if not copy and self.updates % self.config.every:
            return
        weight = 1.0 if copy else 1 - self.config.decay
        if all(master.dtype == torch.float32 for master in self.masters.values()):
            shadow, masters = list(self.shadow.values()), list(self.masters.values())
            torch._foreach_lerp_(shadow, masters, weight)  # pyright: ignore[reportPrivateImportUsage]
            return
        for name, master in self.masters.items():  # a float32 copy of all would be as large again
            self.shadow[name].lerp_(master.float(), weight)

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, Tensor]) -> None:
        """Copy the shadow into a role's parameters of the same names."""
        for name, shadow in self.shadow.items():
            parameters[name].copy_(shadow)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        self.updates = updates
        for name, shadow in self.shadow.items():
            shadow.copy_(state[name])
