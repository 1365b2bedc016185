"""What the tests of sparse attention share: geometries, strided inputs, a run with its gradients."""

import torch
from torch import Tensor

from fastdmd_kernels import Tiles
from fastdmd_kernels.vsa import ops

EVEN, RAGGED = Tiles((8, 4, 8)), Tiles((5, 6, 7))
NAMES = ("q", "k", "v", "gate")


def pair(tiles) -> tuple[Tiles, Tiles]:
    return tiles if isinstance(tiles, tuple) else (tiles, tiles)


def inputs(tiles, B=2, N=2, K=16, dtype=torch.float32, scale=1.0, seed=0) -> dict[str, Tensor]:
    """Draw q, k, v, gate and dout: slices of fused [B, L, N, 3, K], and [B, N, L, K] seen as [B, L, N, K]."""
    g = torch.Generator().manual_seed(seed)
    of_q, of_k = pair(tiles)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).mul(scale).to(dtype)

    k, v, _ = draw(B, of_k.L, N, 3, K).unbind(3)
    q, gate = draw(B, N, of_q.L, K).transpose(1, 2), draw(B, of_q.L, N, 2, K)[..., 0, :]
    return {"q": q, "k": k, "v": v, "gate": gate, "dout": draw(B, of_q.L, N, K)}


def choose(x: dict[str, Tensor], tiles, topk: int) -> Tensor:
    of_q, of_k = pair(tiles)
    return ops.select(ops.pool(x["q"], of_q), ops.pool(x["k"], of_k), of_k, topk)


def run(op, x: dict[str, Tensor], tiles, topk: int, **more) -> dict[str, Tensor]:
    """Return output and gradients; `detach` keeps the strides."""
    leaves = {name: x[name].detach().requires_grad_() for name in NAMES if name in x}
    out = op(leaves["q"], leaves["k"], leaves["v"], leaves.get("gate"), tiles, topk, **more)
    grads = torch.autograd.grad(out, list(leaves.values()), x["dout"])
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def rows_of(tiles: Tiles) -> list[slice]:
    """Return each tile's rows, from the grid alone."""
    counts = [1]
    for size, cut in zip(tiles.grid, tiles.tile, strict=True):
        counts = [count * min(cut, size - i) for count in counts for i in range(0, size, cut)]
    return [slice(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]
