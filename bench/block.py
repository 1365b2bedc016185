"""Count the launches and bytes of one block of Wan, eager and compiled: `python -m bench.block`.

It is of 1.3B's width, at 81 frames of 480 x 832 (32,760 tokens), bfloat16, forward and backward: with
gradients to weights, text and modulation too, or frozen, as the base of adapters is. No GPU: eager ops are
counted on the meta device, compiled code is generated for an H100 and its launches counted (`generated.py`).
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdmd_kernels.attention
from bench.generated import compiler, count, fake_like, generating
from bench.launches import KINDS, Counting, Launches
from fastdmd.models.attention import Dense, Sparse
from fastdmd.models.lowbit import make_products
from fastdmd.models.net import cast
from fastdmd.models.products import GRAIN, Products
from fastdmd.models.wan.layers import WanConfig
from fastdmd.models.wan.net import Wan
from fastdmd.plan.ops import Fused, attention
from fastdmd_kernels import topk_for
from fastdmd_kernels.tiles import CUBE, Grid, Tiles

WIDTH_1_3B = WanConfig(num_attention_heads=12, attention_head_dim=128, num_layers=1, ffn_dim=8960)
GRID = (21, 30, 52)  # tokens of 81 frames of 480 x 832
TEXT = 512
SPARSITY = 0.8  # of DMD on Wan 1.3B


@dataclass(frozen=True)
class Passes:
    """The launches of a block's two directions."""

    forward: Launches
    backward: Launches

    @property
    def both(self) -> Launches:
        return self.forward + self.backward


@dataclass(frozen=True)
class Shape:
    """A block and what it is called with; all tensors of it are on the meta device."""

    config: WanConfig = WIDTH_1_3B
    grid: Grid = GRID
    sparsity: float | None = None  # None: dense
    learns: bool = True  # its weights, and what makes text and modulation
    linear: Products | None = None  # what its products are in; None: bfloat16
    text: int = TEXT

    def block(self) -> nn.Module:
        """Return the block of a network in bfloat16."""
        with torch.device("meta"):
            net = Wan(self.config, None if self.sparsity is None else CUBE)
        cast(net, torch.bfloat16)
        if self.linear is not None:
            make_products(net.blocks, self.linear, torch.float8_e4m3fn, keep=lambda name: False)
        return net.blocks[0].requires_grad_(self.learns)

    def tensors(self) -> list[Tensor]:
        """Return tokens, text, modulation and the table of rotations."""
        L, D = Tiles(self.grid).L, self.config.width
        with torch.device("meta"):
            x, text, modulation = (
                torch.empty(1, *size, dtype=torch.bfloat16) for size in ((L, D), (self.text, D), (6, 1, D))
            )
            rope = torch.empty(2, L, 1, self.config.attention_head_dim)
        for each in (text, modulation):
            each.requires_grad_(self.learns)
        return [x.requires_grad_(), text, modulation, rope]

    def attention(self, device: torch.device) -> Dense | Sparse:
        """Return the block's self-attention, with its tables."""
        if self.sparsity is None:
            return Dense()
        tiles = Tiles(self.grid)
        tiles.on(device)
        return Sparse(tiles, topk_for(self.sparsity, tiles.n))


def learning(block: nn.Module, tensors: list[Tensor]) -> list[Tensor]:
    """Return what gets a gradient."""
    return [x for x in (*tensors, *block.parameters()) if x.requires_grad]


def eager(shape: Shape) -> Passes:
    """Count a block's ops as PyTorch calls them; attention and RMSNorm are an op each, as on a GPU."""
    block, tensors = shape.block(), shape.tensors()
    seam = shape.attention(torch.device("meta"))
    with Counting() as forward, Fused(lambda keeps: None):
        out = block(*tensors, seam)
    grad = torch.empty_like(out)
    with Counting() as backward:
        torch.autograd.grad(out, learning(block, tensors), grad)
    return Passes(forward.found, backward.found)


def compiled(shape: Shape) -> Passes:
    """Count the launches of a block's compiled code."""
    block, tensors = shape.block(), shape.tensors()
    implementations = fastdmd_kernels.attention.IMPLEMENTATIONS
    own = implementations["sdpa"]
    with FakeTensorMode(), generating() as codes:
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(fake_like(parameter), shape.learns))
        seam = shape.attention(torch.device("cpu"))
        implementations["sdpa"] = one_op
        try:
            wrapped = torch.compile(block, fullgraph=True, dynamic=False, backend=compiler)
            fakes = fake_like(tensors)
            out = wrapped(*fakes, seam)
            torch.autograd.grad(out, learning(block, fakes), torch.empty_like(out))
        finally:
            implementations["sdpa"] = own
    forward, backward = map(count, codes)
    return Passes(forward, backward)


def one_op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return dense attention as the plan's op, whose backward is one more."""
    return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))[0].transpose(1, 2)


def lines(before: Passes, after: Passes) -> list[str]:
    """Return the table of eager and compiled code, and what the second has of the first."""
    rows = [f"{'':24}{'eager':>10}{'compiled':>10}{'':>8}{'eager GB':>12}{'compiled GB':>13}"]
    for direction in ("forward", "backward", "both"):
        a, b = getattr(before, direction), getattr(after, direction)
        for kind in KINDS:
            numbers = a.count[kind], b.count[kind], a.bytes[kind], b.bytes[kind]
            rows.append(line(f"{direction}, {kind}", *numbers))
        rows.append(line(f"{direction}, all", a.total, b.total, a.total_bytes, b.total_bytes))
    return rows


def line(name: str, launches: int, fewer: int, size: int, less: int) -> str:
    return (
        f"{name:24}{launches:10}{fewer:10}{fewer / launches:8.1%}"
        f"{size / 1e9:12.3f}{less / 1e9:13.3f}{less / size:8.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.block", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sparsity", type=float, help=f"of video sparse attention ({SPARSITY}); absent: dense"
    )
    parser.add_argument("--frozen", action="store_true", help="gradients go to the tokens alone")
    parser.add_argument("--linear", choices=GRAIN, help="what products are in; absent: bfloat16")
    arguments = parser.parse_args()
    shape = Shape(sparsity=arguments.sparsity, learns=not arguments.frozen, linear=arguments.linear)
    print("\n".join(lines(eager(shape), compiled(shape))))


if __name__ == "__main__":
    main()
