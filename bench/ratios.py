"""How long ops take, as ratios to a reference workload of the same kind that runs between their calls.

A machine that is shared is slower at times, and not for all code alike: beside each op runs code of its kind
and size that is PyTorch's own and does not change here. Of a pair of calls the ratio counts, of many pairs
the median. A CPU's time is the process's, on one thread; a GPU's is taken by events, at larger sizes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench import clock
from bench.clock import Run
from fastdmd.models.attention import Dense
from fastdmd.models.wan.layers import Block, WanConfig, rope_table, rotate
from fastdmd_kernels import Tiles, dmd_loss
from fastdmd_kernels.tiles import Grid

ROUNDS = 200
HEAD_DIM = 64


@dataclass(frozen=True)
class Sizes:
    """Sizes of all tensors: on a CPU they fit in a core's cache, as the memory's speed is shared too."""

    numbers: int  # of each of the loss's tensors, for each of four samples
    grid: Grid  # of tokens
    heads: int
    calls: int  # of the short ops, for a millisecond

    @property
    def tokens(self) -> int:
        return Tiles(self.grid).L

    @property
    def width(self) -> int:
        return self.heads * HEAD_DIM


SIZES = {"cpu": Sizes(1 << 12, (4, 8, 8), 1, 20), "cuda": Sizes(1 << 24, (20, 28, 52), 12, 1)}


@dataclass(frozen=True)
class Pair:
    """An op and its reference, and how often each is called between two readings of the clock."""

    op: Run
    reference: Run
    calls: int = 1


def loss(sizes: Sizes, draw: Callable[..., Tensor]) -> Pair:
    """Return DMD's loss with its gradient, beside a normalised squared distance."""
    x0, z, fake, cond, uncond = (draw(4, sizes.numbers) for _ in range(5))
    a, b, w = draw(4), draw(4), draw(4, 1)

    def op() -> None:
        sample = x0.detach().requires_grad_()
        dmd_loss(sample, z, fake, cond, uncond, a, b, 3.0)[0].backward()

    def reference() -> None:
        sample = x0.detach().requires_grad_()
        difference = z - w * x0 + w * fake
        scale = difference.abs().mean(1, keepdim=True).clamp_min(1e-3)
        target = sample.detach() - (difference / scale).nan_to_num()
        (0.5 * (sample - target).square()).mean().backward()

    return Pair(op, reference, max(1, sizes.calls // 5))


def rotation(sizes: Sizes, draw: Callable[..., Tensor]) -> Pair:
    """Return the rotation of queries, beside the same number of products and copies."""
    x = draw(1, sizes.tokens, sizes.heads, HEAD_DIM)
    rope = rope_table(sizes.grid, HEAD_DIM, None, x.device)
    weight = draw(sizes.tokens, 1, HEAD_DIM)

    def reference() -> None:
        first, second = x.view(*x.shape[:-1], 2, -1).unbind(-2)
        torch.addcmul(x * weight, torch.stack([second, first], dim=-2).flatten(-2), weight)

    return Pair(lambda: rotate(x, rope), reference, sizes.calls)


def block(sizes: Sizes, draw: Callable[..., Tensor]) -> Pair:
    """Return a block of Wan, both directions, beside PyTorch's own layer of a transformer."""
    D, x = sizes.width, draw(1, sizes.tokens, sizes.width).requires_grad_()
    text, modulation = draw(1, 64, D), draw(1, 6, 1, D)
    rope = rope_table(sizes.grid, HEAD_DIM, None, x.device)
    config = WanConfig(
        num_attention_heads=sizes.heads, attention_head_dim=HEAD_DIM, num_layers=1, ffn_dim=4 * D
    )
    ours = Block(config, gated=False).to(x.device)
    layer = nn.TransformerEncoderLayer(
        D, sizes.heads, 4 * D, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).to(x.device)

    def both(module: nn.Module, *arguments: object) -> Run:
        learning = [x, *module.parameters()]

        def run() -> None:
            out = module(x, *arguments)
            torch.autograd.grad(out, learning, torch.ones_like(out))

        return run

    return Pair(both(ours, text, modulation, rope, Dense()), both(layer))


PAIRS = {"dmd_loss": loss, "rotate": rotation, "block": block}


def seconds(run: Run, calls: int, device: torch.device) -> float:
    """Return what some calls take."""
    if device.type == "cuda":
        moment = clock.Moment()
        for _ in range(calls):
            run()
        return clock.Moment() - moment
    start = time.process_time()
    for _ in range(calls):
        run()
    return time.process_time() - start


def ratios(pair: Pair, device: torch.device) -> list[float]:
    """Return the ratio of each round: reference, op, op, reference, so that a drift is in both alike."""
    found: list[float] = []
    for _ in range(1 + ROUNDS):
        before = seconds(pair.reference, pair.calls, device)
        ops = seconds(pair.op, pair.calls, device) + seconds(pair.op, pair.calls, device)
        found.append(ops / (before + seconds(pair.reference, pair.calls, device)))
    return found[1:]


def measure(device: torch.device, names: Sequence[str]) -> dict[str, list[float]]:
    """Return the ratios of ops by name."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    return {name: ratios(PAIRS[name](SIZES[device.type], draw), device) for name in names}
