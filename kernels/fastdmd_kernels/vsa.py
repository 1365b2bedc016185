"""Video sparse attention (VSA, arXiv 2505.13389): each tile of queries attends to the topk tiles of keys that a coarse
attention over tile means scores highest, and gets what the coarse attention found as well, through a gate.

B batch, L tokens in tile order (see tiles.py; Lq, Lk where they differ), N heads, K head dim, n tiles (nq, nk).

    q_c, k_c, v_c = tile means in float32                       coarse
    out_c = softmax(q_c k_c^T / sqrt(K)) v_c                    given to every token of the tile
    lists = the topk tiles of each row of q_c k_c^T             no gradient; ties to the lowest index
    out   = out_c * gate + attention over the listed tiles      fine

`vsa_reference` defines the op. Its stages are in vsa_ops.py; who computes them is decided in dispatch.py.
"""

import math

import torch
from torch import Tensor

from fastdmd_kernels.tiles import N_VALID_BITS, Tiles
from fastdmd_kernels.vsa_ops import check_slots, fine, pool, select, spread

TilesOrPair = Tiles | tuple[Tiles, Tiles]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def topk_for(sparsity: float, n_tiles: int) -> int:
    """Key tiles that a query tile keeps: ceil((1 - sparsity) n_tiles), at least 1. Count tiles, not padded tokens."""
    if not 0 <= sparsity <= 1 or n_tiles < 1:
        raise ValueError(f"sparsity {sparsity} is not in 0..1, or there are no tiles ({n_tiles})")
    # 1 - 0.7 is 0.30000000000000004, and of 10 tiles that would be 4
    return max(1, math.ceil(round((1 - sparsity) * n_tiles, 6)))


def video_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, tiles: TilesOrPair, topk: int
) -> Tensor:
    """out_c * gate + out_fine, [B, Lq, N, K] in the dtype of q; gradients to q, k, v and gate, none through the choice.

    q, gate [B, Lq, N, K], k, v [B, Lk, N, K], any strides, tokens in tile order; gate None: no coarse branch, as a gate
    of 0. tiles: the geometry of queries and keys, or a pair (of queries, of keys). topk: key tiles per query tile,
    1..nk; nk is dense attention. bfloat16, float16, float32, and float64 on the CPU; softmax and tile means in float32
    at least. Two runs agree bit for bit. Raises ValueError, with the shapes, for what it cannot do.

    Errors are at most twice those of the same composition in the same dtype. The backward recomputes the scores: the
    triton kernel takes S = q k^T for dq and S^T = k q^T for dk and dv. Where the processor rounds the two products
    differently, exp(S^T - log-sum-exp) is not the forward's probability but off by a factor of about 1 + |S| eps, so
    that the float32 errors of dk and dv grow with |S|: they are at most twice those of a composition that recomputes
    S^T as well. With equal rounding, and always in the torch backend, a plain softmax is the measure.
    """
    q_tiles, k_tiles = _pair(tiles)
    _check(q, k, v, gate, q_tiles, k_tiles, topk)
    check_slots(q_tiles, q.device)
    # under autocast scores would be bfloat16, and the choice of tiles chaotic; the meta device has no autocast
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        coarse = gate is not None
        q_c = pool(q if coarse else q.detach(), q_tiles)
        k_c = pool(k if coarse else k.detach(), k_tiles)
        lists = select(q_c.detach(), k_c.detach(), k_tiles, topk)
        out = fine(q, k, v, lists, q_tiles, k_tiles)
        if gate is None:
            return out
        # written out: on CUDA the float32 backward of scaled_dot_product_attention adds in any order
        out_c = torch.softmax(q_c @ k_c.mT * q.shape[-1] ** -0.5, dim=-1) @ pool(v, k_tiles)
        return torch.addcmul(out, spread(out_c, q_tiles, out.dtype), gate)


def vsa_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    tiles: TilesOrPair,
    topk: int,
    lists: Tensor | None = None,
) -> Tensor:
    """The definition of `video_sparse_attention`: a dense masked attention in plain PyTorch, any dtype, slow.

    `lists`, int32 [B, N, nq, topk] as the op makes them, overrides the choice: two sides that round differently may
    choose differently, and one tile of 24 changed an output by 20 %.
    """
    q_tiles, k_tiles = _pair(tiles)
    _check(q, k, v, gate, q_tiles, k_tiles, topk)
    geometry_q, geometry_k = q_tiles.on(q.device), k_tiles.on(k.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, L, K]

    def mean(x: Tensor, of: Tiles) -> Tensor:
        """[B, N, L, K] -> [B, N, n, K]"""
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
    out = _attend(q, k, v, keep).transpose(1, 2)
    if gate is None:
        return out
    out_c = torch.softmax(scores_c, dim=-1) @ v_c  # [B, N, nq, K]
    return out_c.transpose(1, 2)[:, geometry_q.tile_of_row].to(out.dtype) * gate + out


def _attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Attend densely over the pairs that `keep` [B, N, Lq, Lk] allows, q, k, v [B, N, L, K] -> [B, N, Lq, K]."""
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -math.inf)
    return torch.softmax(scores, dim=-1) @ v


def _pair(tiles: TilesOrPair) -> tuple[Tiles, Tiles]:
    return (tiles, tiles) if isinstance(tiles, Tiles) else tiles


def _check(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, q_tiles: Tiles, k_tiles: Tiles, topk: int) -> None:
    def refuse(why: str) -> ValueError:
        return ValueError(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: {why}")

    if q.ndim != 4 or k.ndim != 4 or v.shape != k.shape or k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise refuse("needed are q [B, Lq, N, K], k and v [B, Lk, N, K]")
    if min(q.shape) < 1:
        raise refuse("nothing to attend to")
    if gate is not None and gate.shape != q.shape:
        raise refuse(f"the gate {list(gate.shape)} needs the shape of q")
    given = (q, k, v) if gate is None else (q, k, v, gate)
    if q.dtype not in DTYPES or any(x.dtype != q.dtype for x in given):
        raise refuse(f"dtypes {[x.dtype for x in given]} are not one of {list(DTYPES)}")
    if any(x.device != q.device for x in given):
        raise refuse(f"on different devices {[str(x.device) for x in given]}")
    if q.shape[1] != q_tiles.L or k.shape[1] != k_tiles.L:
        raise refuse(f"grid {q_tiles.grid} has {q_tiles.L} queries, grid {k_tiles.grid} has {k_tiles.L} keys")
    if q_tiles.tile != k_tiles.tile:
        raise refuse(f"tiles of queries {q_tiles.tile} and of keys {k_tiles.tile} differ")
    if q_tiles.slots >> N_VALID_BITS or k_tiles.L >> 31 - N_VALID_BITS:
        raise refuse(f"{q_tiles.slots} slots in a tile or {k_tiles.L} keys do not fit the lists' int32 words")
    if not 1 <= topk <= k_tiles.n:
        raise refuse(f"topk {topk} is not in 1..{k_tiles.n}, the tiles of grid {k_tiles.grid}")
