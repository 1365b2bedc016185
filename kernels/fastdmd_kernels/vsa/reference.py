"""The definition of video sparse attention (VSA, arXiv 2505.13389), a dense masked attention in PyTorch.

B batch, L tokens in tile order (Lq, Lk), N heads, K head dim, n tiles (nq, nk); the equations are in api.py.
"""

import math

import torch
from torch import Tensor

from fastdmd_kernels.tiles import N_VALID_BITS, Tiles

TilesOrPair = Tiles | tuple[Tiles, Tiles]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def vsa_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    tiles: TilesOrPair,
    topk: int,
    lists: Tensor | None = None,
) -> Tensor:
    """Define `video_sparse_attention`: a dense masked attention in plain PyTorch, any dtype, slow.

    `lists`, int32 [B, N, nq, topk] as the op makes them, overrides the choice: two sides that round
    differently may choose differently, and one tile of 24 changed an output by 20 %.
    """
    q_tiles, k_tiles = pair(tiles)
    check(q, k, v, gate, q_tiles, k_tiles, topk)
    geometry_q, geometry_k = q_tiles.on(q.device), k_tiles.on(k.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, L, K]

    def mean(x: Tensor, of: Tiles) -> Tensor:
        """Average x [B, N, L, K] over tiles, [B, N, n, K]."""
        x = x if x.dtype == torch.float64 else x.float()
        return torch.stack([tile.mean(2) for tile in x.split(of.on(x.device).n_valid.tolist(), dim=2)], dim=2)

    q_c, k_c, v_c = mean(q, q_tiles), mean(k, k_tiles), mean(v, k_tiles)
    scores_c = q_c @ k_c.mT * q.shape[-1] ** -0.5  # [B, N, nq, nk]
    if lists is None:
        chosen = scores_c.detach().argsort(dim=-1, descending=True, stable=True)[..., :topk]
    else:
        chosen = torch.searchsorted(geometry_k.row_start, (lists >> N_VALID_BITS).contiguous())
    keep = torch.zeros_like(scores_c, dtype=torch.bool).scatter(-1, chosen, True)
    keep = keep[:, :, geometry_q.tile_of_row][..., geometry_k.tile_of_row]  # [B, N, Lq, Lk]
    out = attend(q, k, v, keep).transpose(1, 2)
    if gate is None:
        return out
    out_c = torch.softmax(scores_c, dim=-1) @ v_c  # [B, N, nq, K]
    return out_c.transpose(1, 2)[:, geometry_q.tile_of_row].to(out.dtype) * gate + out


def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Attend densely over the pairs that `keep` [B, N, Lq, Lk] allows.

    q [B, N, Lq, K], k, v [B, N, Lk, K] -> [B, N, Lq, K].
    """
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -math.inf)
    return torch.softmax(scores, dim=-1) @ v


def pair(tiles: TilesOrPair) -> tuple[Tiles, Tiles]:
    """Return the geometries (of queries, of keys)."""
    return (tiles, tiles) if isinstance(tiles, Tiles) else tiles


def check(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, q_tiles: Tiles, k_tiles: Tiles, topk: int
) -> None:
    """Raise ValueError, with the shapes, for what the op cannot do."""

    def refuse(why: str) -> ValueError:
        return ValueError(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: {why}")

    if (
        q.ndim != 4
        or k.ndim != 4
        or v.shape != k.shape
        or k.shape[0] != q.shape[0]
        or k.shape[2:] != q.shape[2:]
    ):
        raise refuse("needed are q [B, Lq, N, K], k and v [B, Lk, N, K]")
    if min(q.shape) < 1:
        raise refuse("nothing to attend to")
    if gate is not None and gate.shape != q.shape:
        raise refuse(f"the gate {list(gate.shape)} needs the shape of q")
    inputs = (q, k, v) if gate is None else (q, k, v, gate)
    if q.dtype not in DTYPES or any(x.dtype != q.dtype for x in inputs):
        raise refuse(f"dtypes {[x.dtype for x in inputs]} are not one of {list(DTYPES)}")
    if any(x.device != q.device for x in inputs):
        raise refuse(f"on different devices {[str(x.device) for x in inputs]}")
    if q.shape[1] != q_tiles.L or k.shape[1] != k_tiles.L:
        raise refuse(f"grid {q_tiles.grid} has {q_tiles.L} queries, grid {k_tiles.grid} has {k_tiles.L} keys")
    if q_tiles.tile != k_tiles.tile:
        raise refuse(f"tiles of queries {q_tiles.tile} and of keys {k_tiles.tile} differ")
    if q_tiles.slots >> N_VALID_BITS or k_tiles.L >> 31 - N_VALID_BITS:
        raise refuse(f"{q_tiles.slots} slots in a tile or {k_tiles.L} keys do not fit the lists' int32 words")
    if not 1 <= topk <= k_tiles.n:
        raise refuse(f"topk {topk} is not in 1..{k_tiles.n}, the tiles of grid {k_tiles.grid}")
