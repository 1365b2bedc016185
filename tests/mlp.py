"""Three 2-layer perceptrons as student, teacher and critic: every method runs on them in milliseconds."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdmd import rollout as rollouts
from fastdmd.batch import Batch, Cond
from fastdmd.denoiser import Denoiser
from fastdmd.methods.method import Carry, Loss, Method
from fastdmd.models import net
from fastdmd.models.net import Net
from fastdmd.rng import Rng
from fastdmd.schedule import Schedule, send

SHAPE = (2, 3, 2, 2)  # C, T, H, W
TOKENS, TEXT_DIM = 3, 4


class Call(NamedTuple):
    """One call of a network, as it came in."""

    x_t: Tensor
    model_t: Tensor
    text: Tensor
    grad: bool


class MLP(Net):
    """F(x_t, model_t, text, guidance if given), and a record of its calls."""

    widths = ()

    def __init__(self, seed: int) -> None:
        super().__init__()
        size = torch.Size(SHAPE).numel()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.last = nn.Linear(size + 1 + TEXT_DIM, 32), nn.Linear(32, size)
        self.calls: list[Call] = []

    def start_from_scratch(self) -> "MLP":
        return self

    def flops(self, shape: Iterable[int], text_tokens: int, call: net.Call = net.PLAIN) -> int:
        shape = tuple(shape)
        return 2 * shape[0] * sum(p.numel() for p in self.parameters())

    def forward(self, x_t: Tensor, model_t: Tensor, cond: Cond, call: net.Call = net.PLAIN) -> net.Out:
        self.calls.append(Call(x_t.detach(), model_t, cond.text, torch.is_grad_enabled()))
        w = 0 if cond.guidance is None else cond.guidance[:, None]
        h = torch.cat([x_t.flatten(1), model_t[:, None] / 1000 + w, cond.text.mean(1)], dim=1)
        return net.Out(self.last(torch.tanh(self.first(h))).view_as(x_t), [])


class Deep(MLP):
    """With three blocks between, whose hidden states [B, 8, 1, 2, 2] can be looked at."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 + seed)
            self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.widths = (8, 8, 8)

    def forward(self, x_t: Tensor, model_t: Tensor, cond: Cond, call: net.Call = net.PLAIN) -> net.Out:
        self.calls.append(Call(x_t.detach(), model_t, cond.text, torch.is_grad_enabled()))
        h, maps = torch.cat([x_t.flatten(1), model_t[:, None] / 1000, cond.text.mean(1)], dim=1), []
        h = torch.tanh(self.first(h))
        for index, block in enumerate(self.blocks):
            h = h + torch.tanh(block(h))
            if index in call.layers:
                maps.append(h.view(-1, 8, 1, 2, 2))
        return net.Out(self.last(h).view_as(x_t), maps)


class Formula(Net):
    """A network that is a formula of x_t and model_t: subclasses have it as `F`."""

    widths = ()

    def start_from_scratch(self) -> "Formula":
        return self

    def flops(self, shape: Iterable[int], text_tokens: int, call: net.Call = net.PLAIN) -> int:
        return 0

    @abstractmethod
    def F(self, x_t: Tensor, model_t: Tensor) -> Tensor: ...

    def forward(self, x_t: Tensor, model_t: Tensor, cond: Cond, call: net.Call = net.PLAIN) -> net.Out:
        return net.Out(self.F(x_t, model_t), [])


def deep_nets(schedule: Schedule, roles: Iterable[str]) -> dict[str, Denoiser]:
    """By role, without a discriminator."""
    return {role: Denoiser(Deep(seed), schedule) for seed, role in enumerate(roles) if role != "disc"}


def with_heads(nets: dict[str, Denoiser], heads: nn.Module, schedule: Schedule) -> dict[str, Denoiser]:
    return {**nets, "disc": Denoiser(heads, schedule)}


def three_nets(schedule: Schedule) -> dict[str, Denoiser]:
    return {role: Denoiser(MLP(seed), schedule) for seed, role in enumerate(("student", "teacher", "critic"))}


def make_batch(size: int = 4) -> Batch:
    rng = Rng(0, 0, "data", range(size), "cpu")
    text, x0 = rng.normal((TOKENS, TEXT_DIM)), rng.normal(SHAPE)
    return Batch(Cond(text), Cond(torch.zeros_like(text)), SHAPE, x0)


def loss(method: Method, phase: str, nets: dict[str, Denoiser], batch: Batch, rng: Rng, carry: Carry) -> Loss:
    """Draw a phase and return its loss, as the trainer does."""
    draws = method.draw(phase, rng, batch.latent_shape, carry)
    return method.loss(phase, nets, batch, draws, carry)


class Rolled(NamedTuple):
    """A rollout's output, and its exit step's time and the next one's."""

    x0_g: Tensor
    window: rollouts.Window


def roll(
    student: Denoiser, batch: Batch, times: Tensor, config: rollouts.Config, rng: Rng, grad: bool = True
) -> Rolled:
    """Draw a rollout and make it, as a method does."""
    draws = rollouts.draw(times, config, batch.latent_shape, rng)
    steps, _ = send(student.schedule, draws.host_times(), draws.noise)
    return Rolled(rollouts.rollout(student, batch, draws, steps, config, grad), draws.window)


def with_gradient(nets: Mapping[str, Denoiser]) -> set[str]:
    """Return the roles of which some parameter has a gradient."""
    return {role for role, net in nets.items() if any(p.grad is not None for p in net.net.parameters())}


def gradient(net: nn.Module) -> Tensor:
    """Return the gradients of all parameters in one vector."""
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
