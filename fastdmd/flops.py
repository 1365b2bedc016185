"""FLOPs of a step, from the shapes of its network calls: no network runs, and none counts while it does."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from fastdmd.batch import Cond
from fastdmd.denoiser import Denoiser
from fastdmd.models.attention import Attention
from fastdmd.models.net import PLAIN, Call, Net, Out
from fastdmd.rng import Rng
from fastdmd.run import Run


class Flops(NamedTuple):
    """What calls of a network cost, and the backwards that come to them."""

    forward: int
    backward: int


class Shapes(Net):
    """Stand in for a network: count each call by its shapes, and answer in the right ones.

    A backward costs one forward for the inputs and one for the parameters, of which adapters are few; that of
    attention, which has inputs alone, costs two.
    """

    def __init__(self, net: Net, learns: bool, device: torch.device, adapters: bool = False) -> None:
        super().__init__()
        self.real: Any = (net,)  # in a tuple: it is no part of this module
        self.count = Flops(0, 0)
        self.widths = net.widths
        self.adapters = adapters
        self.weight = nn.Parameter(torch.ones((), device=device), requires_grad=learns)

    def topk(self, shape: Iterable[int], sparsity: float) -> int | None:
        return self.real[0].topk(shape, sparsity)

    def attention(self, shape: Iterable[int], topk: int | None) -> Attention | None:
        return self.real[0].attention(shape, topk)

    def start_video(self, shape: Iterable[int]) -> Any:
        return self.real[0].start_video(shape)

    def start_from_scratch(self) -> Self:
        raise NotImplementedError

    def flops(self, shape: Iterable[int], text_tokens: int, call: Call = PLAIN) -> int:
        return self.real[0].flops(shape, text_tokens, call)

    def attention_flops(self, shape: Iterable[int], text_tokens: int, call: Call = PLAIN) -> int:
        return self.real[0].attention_flops(shape, text_tokens, call)

    def forward(self, x_t: Tensor, model_t: Tensor, cond: Cond, call: Call = PLAIN) -> Out:
        F = x_t * self.weight
        flops = self.flops(x_t.shape, cond.text.shape[1], call)
        backward = 0
        if F.requires_grad:
            whole = self.weight.requires_grad and not self.adapters
            rest = flops if whole else self.attention_flops(x_t.shape, cond.text.shape[1], call)
            backward = flops + rest
        self.count = Flops(self.count.forward + flops, self.count.backward + backward)
        if call.write:
            call.cache.tokens += math.prod(self.real[0].grid(x_t.shape))
        inside = F.flatten(1).mean(1)[:, None, None]
        return Out(F, [inside.expand(-1, self.widths[layer], 2) for layer in call.layers])


def step_flops(run: Run) -> int:
    """Return the FLOPs of the step to come."""
    return sum(sum(count) for _, roles in phase_flops(run) for count in roles.values())


def phase_flops(run: Run) -> list[tuple[str, dict[str, Flops]]]:
    """Return the phases of the step to come, each with the FLOPs of its roles, of all micro-batches.

    Its draws are functions of their address, and are made again for it.
    """
    config = run.config.run
    micro = range(config.batch_size)
    batch = run.world.batch(Rng(config.seed, run.step, "data", micro, "cpu"))
    found: list[tuple[str, dict[str, Flops]]] = []
    carry: dict[str, Any] = {}
    for index, phase in enumerate(run.method.phases(run.step)):
        trained, nets = run.method.trains(phase), dict(run.nets)
        for role, denoiser in run.nets.items():
            if isinstance(denoiser.net, Net):  # a discriminator's heads are small
                shapes = Shapes(denoiser.net, role in trained, run.device, denoiser.role is not None)
                nets[role] = Denoiser(shapes, run.schedule, dense=denoiser.dense)
                nets[role].keep(denoiser.sparsity, batch.latent_shape)
        rng = Rng(config.seed, run.step, f"{phase}{index}", micro, run.device)
        run.method.loss(phase, nets, batch, run.method.draw(phase, rng, batch.latent_shape, carry), carry)
        counts = {role: d.net.count for role, d in nets.items() if isinstance(d.net, Shapes)}
        found.append(
            (phase, {role: Flops(*(config.grad_accum * n for n in c)) for role, c in counts.items()})
        )
    return found
