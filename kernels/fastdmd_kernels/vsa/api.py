"""Video sparse attention (VSA, arXiv 2505.13389).

Each tile of queries attends to the topk tiles of keys that a coarse attention over tile means scores highest,
and gets what the coarse attention found as well, through a gate.

B batch, L tokens in tile order (see tiles.py; Lq, Lk where they differ), N heads, K head dim, n tiles (nq,
nk).

    q_c, k_c, v_c = tile means in float32                       coarse
    out_c = softmax(q_c k_c^T / sqrt(K)) v_c                    broadcast to the tokens of the tile
    lists = the topk tiles of each row of q_c k_c^T             no gradient; ties to the lowest index
    out   = out_c * gate + attention over the listed tiles      fine

`vsa_reference` (reference.py) defines the op. Its stages are in ops.py; who computes them is decided in
dispatch.py.
"""

import math

import torch
from torch import Tensor

from fastdmd_kernels.vsa.ops import check_slots, fine, pool, select, spread
from fastdmd_kernels.vsa.reference import TilesOrPair, check, pair


def topk_for(sparsity: float, n_tiles: int) -> int:
    """Return how many key tiles a query tile keeps: ceil((1 - sparsity) n_tiles), at least 1.

    Count tiles, not padded tokens.
    """
    if not 0 <= sparsity <= 1 or n_tiles < 1:
        raise ValueError(f"sparsity {sparsity} is not in 0..1, or there are no tiles ({n_tiles})")
    # 1 - 0.7 is 0.30000000000000004, and of 10 tiles that would be 4
    return max(1, math.ceil(round((1 - sparsity) * n_tiles, 6)))


def video_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, tiles: TilesOrPair, topk: int
) -> Tensor:
    """Compute out_c * gate + out_fine, [B, Lq, N, K] in the dtype of q.

    q, gate [B, Lq, N, K], k, v [B, Lk, N, K], any strides, tokens in tile order; gate None: no coarse branch,
    as a gate of 0. tiles: the geometry of queries and keys, or a pair (of queries, of keys). topk: key tiles
    per query tile, 1..nk; nk is dense attention. bfloat16, float16, float32, and float64 on the CPU; softmax
    and tile means in float32 at least. Gradients go to q, k, v and gate, none through the choice. Two runs
    agree bit for bit. Raises ValueError, with the shapes, for what it cannot do.

    Errors are at most twice those of the same composition in the same dtype. The backward recomputes the
    scores: the triton kernel takes S = q k^T for dq and S^T = k q^T for dk and dv. Where the processor rounds
    the two products differently, exp(S^T - log-sum-exp) is not the forward's probability but off by a factor
    of about 1 + |S| eps, so that the float32 errors of dk and dv grow with |S|: they are at most twice those
    of a composition that recomputes S^T as well. With equal rounding, and always in the torch backend, a
    plain softmax is the measure.
    """
    q_tiles, k_tiles = pair(tiles)
    check(q, k, v, gate, q_tiles, k_tiles, topk)
    check_slots(q_tiles, q.device)
    # under autocast scores would be bfloat16, and the choice of tiles chaotic; the meta device has no
    # autocast
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
