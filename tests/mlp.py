"""Three 2-layer perceptrons as student, teacher and critic: every method runs on them in milliseconds."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdmd.denoiser import Batch, Cond, Denoiser
from fastdmd.rng import Rng
from fastdmd.schedule import Schedule

SHAPE = (2, 3, 2, 2)  # C, T, H, W
TOKENS, TEXT_DIM = 3, 4


class Call(NamedTuple):
    """One call of a network, as it came in."""

    x_t: Tensor
    model_t: Tensor
    text: Tensor
    grad: bool


class MLP(nn.Module):
    """F(x_t, model_t, text, guidance if told), and a record of its calls."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        size = torch.Size(SHAPE).numel()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.last = nn.Linear(size + 1 + TEXT_DIM, 32), nn.Linear(32, size)
        self.calls: list[Call] = []

    def flops(self, shape: torch.Size, text_tokens: int) -> int:
        return 2 * shape[0] * sum(p.numel() for p in self.parameters())

    def forward(self, x_t: Tensor, model_t: Tensor, cond: Cond) -> Tensor:
        self.calls.append(Call(x_t.detach(), model_t, cond.text, torch.is_grad_enabled()))
        told = 0 if cond.guidance is None else cond.guidance[:, None]
        h = torch.cat([x_t.flatten(1), model_t[:, None] / 1000 + told, cond.text.mean(1)], dim=1)
        return self.last(torch.tanh(self.first(h))).view_as(x_t)


class Deep(MLP):
    """With three blocks between, whose hidden states [B, 8, 1, 2, 2] can be looked at."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 + seed)
            self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.widths = (8, 8, 8)

    def forward(self, x_t: Tensor, model_t: Tensor, cond: Cond) -> Tensor:
        return self.features(x_t, model_t, cond, ())[0]

    def features(
        self, x_t: Tensor, model_t: Tensor, cond: Cond, layers: Collection[int]
    ) -> tuple[Tensor, list[Tensor]]:
        self.calls.append(Call(x_t.detach(), model_t, cond.text, torch.is_grad_enabled()))
        h, maps = torch.cat([x_t.flatten(1), model_t[:, None] / 1000, cond.text.mean(1)], dim=1), []
        h = torch.tanh(self.first(h))
        for index, block in enumerate(self.blocks):
            h = h + torch.tanh(block(h))
            if index in layers:
                maps.append(h.view(-1, 8, 1, 2, 2))
        return self.last(h).view_as(x_t), maps


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


def gradient(net: nn.Module) -> Tensor:
    """The gradients of all parameters in one vector."""
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
