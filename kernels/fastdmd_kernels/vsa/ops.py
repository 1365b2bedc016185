"""The stages of video sparse attention as registered ops: each is one node of torch.compile and autograd.

B batch, L tokens in tile order (Lq, Lk), N heads, K head dim, n tiles (nq, nk). The tensors of a geometry are
arguments of an op (tiles.py makes them), so that a graph has them as inputs. Every output is contiguous.
"""

from types import ModuleType

import torch
from torch import Tensor

from fastdmd_kernels import dispatch
from fastdmd_kernels.tiles import Tiles

GPU_SLOTS = 64  # the kernels' blocks; no log-sum-exp has fewer slots either


def pool(x: Tensor, tiles: Tiles) -> Tensor:
    """Return the tile means of x [B, L, N, K], float32 (float64 for float64) [B, N, n, K]; gradient to x."""
    return torch.ops.fastdmd.vsa_pool(x, *tiles.on(x.device)[:3], True)


def spread(x: Tensor, tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """Give a tile's row to each of its tokens, x [B, N, n, K] -> [B, L, N, K] in `dtype`; gradient to x."""
    return torch.ops.fastdmd.vsa_spread(x, *tiles.on(x.device)[:3], False, dtype)


def select(q_c: Tensor, k_c: Tensor, k_tiles: Tiles, topk: int) -> Tensor:
    """Choose the topk key tiles of highest q_c k_c^T per query tile, ties to the lowest index.

    q_c [B, N, nq, K], k_c [B, N, nk, K], float32 -> int32 [B, N, nq, topk], ascending: (row_start << 7) |
    n_valid.
    """
    geometry = k_tiles.on(k_c.device)
    return torch.ops.fastdmd.vsa_select(q_c, k_c, geometry.row_start, geometry.n_valid, topk)


def fine(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, q_tiles: Tiles, k_tiles: Tiles) -> Tensor:
    """Attend from each tile's queries to the tiles of its list, [B, Lq, N, K]; gradients to q, k, v."""
    of_q, of_k = q_tiles.on(q.device), k_tiles.on(q.device)
    geometry = (of_q.row_start, of_q.n_valid, of_k.row_start, of_k.n_valid)
    return torch.ops.fastdmd.vsa_fine(q, k, v, lists, *geometry, max(GPU_SLOTS, q_tiles.fullest))[0]


def check_slots(tiles: Tiles, device: torch.device) -> None:
    """Raise ValueError for tiles with more slots than the triton kernels take, where these would run."""
    if dispatch.backend(device) == "triton" and tiles.slots > GPU_SLOTS:
        raise ValueError(f"tile {tiles.tile} has {tiles.slots} slots, the triton kernels take {GPU_SLOTS}")


def _stages(device: torch.device) -> ModuleType:
    return dispatch.module("vsa", device)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ----------------------------------------------------------------------------------------------- pool, spread
# The transpose of a mean over tiles is a spread of shares, and that of a spread is a sum: two ops, each the
# other's backward.


def _pool(x: Tensor, row_start: Tensor, n_valid: Tensor, tile_of_row: Tensor, mean: bool) -> Tensor:
    """Compute the means or the sums of tiles."""
    # the gradient of a sum is expanded, with strides of 0
    x = x if x.stride(-1) == 1 else x.contiguous()
    means = _stages(x.device).pool(x, row_start, n_valid)
    return means if mean else means * n_valid[:, None]


def _pool_fake(x: Tensor, row_start: Tensor, n_valid: Tensor, tile_of_row: Tensor, mean: bool) -> Tensor:
    B, _, N, K = x.shape
    return x.new_empty(B, N, row_start.shape[0], K, dtype=_at_least_float32(x.dtype))


def _pool_setup(ctx, inputs, output) -> None:
    x, *geometry, ctx.mean = inputs
    ctx.save_for_backward(*geometry)
    ctx.dtype = x.dtype


def _pool_backward(ctx, dout: Tensor):
    dx = torch.ops.fastdmd.vsa_spread(dout, *ctx.saved_tensors, ctx.mean, ctx.dtype)
    return dx, None, None, None, None


def _spread(
    x: Tensor, row_start: Tensor, n_valid: Tensor, tile_of_row: Tensor, mean: bool, dtype: torch.dtype
) -> Tensor:
    """Give the tile's row to each token, or the token's share of it."""
    x = x / n_valid[:, None] if mean else x
    return x.to(dtype).transpose(1, 2).contiguous().index_select(1, tile_of_row)


def _spread_fake(
    x: Tensor, row_start: Tensor, n_valid: Tensor, tile_of_row: Tensor, mean: bool, dtype: torch.dtype
) -> Tensor:
    B, N, _, K = x.shape
    return x.new_empty(B, tile_of_row.shape[0], N, K, dtype=dtype)


def _spread_setup(ctx, inputs, output) -> None:
    x, *geometry, ctx.mean, _ = inputs
    ctx.save_for_backward(*geometry)
    ctx.dtype = x.dtype


def _spread_backward(ctx, dout: Tensor):
    dx = torch.ops.fastdmd.vsa_pool(dout, *ctx.saved_tensors, ctx.mean)
    return dx.to(ctx.dtype), None, None, None, None, None


# ----------------------------------------------------------------------------------------------------- select


def _select(q_c: Tensor, k_c: Tensor, row_start_k: Tensor, n_valid_k: Tensor, topk: int) -> Tensor:
    return _stages(q_c.device).select(q_c, k_c, row_start_k, n_valid_k, topk)


def _select_fake(q_c: Tensor, k_c: Tensor, row_start_k: Tensor, n_valid_k: Tensor, topk: int) -> Tensor:
    return q_c.new_empty(*q_c.shape[:3], topk, dtype=torch.int32)


# ------------------------------------------------------------------------------------------------------- fine


def _fine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    row_start_q: Tensor,
    n_valid_q: Tensor,
    row_start_k: Tensor,
    n_valid_k: Tensor,
    slots: int,
) -> tuple[Tensor, Tensor]:
    """Return (out [B, Lq, N, K], log-sum-exp [B, N, nq, slots], base 2, for the backward)."""
    return _stages(q.device).fine_fwd(q, k, v, lists, row_start_q, n_valid_q)


def _fine_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    row_start_q: Tensor,
    n_valid_q: Tensor,
    row_start_k: Tensor,
    n_valid_k: Tensor,
    slots: int,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(*lists.shape[:3], slots, dtype=_at_least_float32(q.dtype))


def _fine_setup(ctx, inputs, output) -> None:
    q, k, v, lists, *geometry, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, lists, *geometry)


def _fine_backward(ctx, dout: Tensor, _):
    dq, dk, dv = torch.ops.fastdmd.vsa_fine_backward(dout, *ctx.saved_tensors)
    return dq, dk, dv, None, None, None, None, None, None


def _fine_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Tensor,
    row_start_q: Tensor,
    n_valid_q: Tensor,
    row_start_k: Tensor,
    n_valid_k: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    # the gradient of a sum is expanded, with strides of 0
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    geometry = (row_start_q, n_valid_q, row_start_k, n_valid_k)
    return _stages(q.device).fine_bwd(dout, q, k, v, out, lse, lists, *geometry)


def _fine_gradients_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Tensor,
    row_start_q: Tensor,
    n_valid_q: Tensor,
    row_start_k: Tensor,
    n_valid_k: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# ----------------------------------------------------------------------------------------------- registration

_TILES = "Tensor row_start, Tensor n_valid, Tensor tile_of_row"
_PAIR = "Tensor row_start_q, Tensor n_valid_q, Tensor row_start_k, Tensor n_valid_k"

IMPLEMENTATIONS = {  # name -> schema, what computes it, what says its shapes
    "vsa_pool": (f"(Tensor x, {_TILES}, bool mean) -> Tensor", _pool, _pool_fake),
    "vsa_spread": (f"(Tensor x, {_TILES}, bool mean, ScalarType dtype) -> Tensor", _spread, _spread_fake),
    # SymInt: an int would be a constant of the graph, which a sparsity warm-up compiles anew at each value
    "vsa_select": (
        "(Tensor q_c, Tensor k_c, Tensor row_start_k, Tensor n_valid_k, SymInt topk) -> Tensor",
        _select,
        _select_fake,
    ),
    "vsa_fine": (
        f"(Tensor q, Tensor k, Tensor v, Tensor lists, {_PAIR}, int slots) -> (Tensor, Tensor)",
        _fine,
        _fine_fake,
    ),
    "vsa_fine_backward": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor lists,"
        f" {_PAIR}) -> (Tensor, Tensor, Tensor)",
        _fine_gradients,
        _fine_gradients_fake,
    ),
}
for _name, (_schema, _compute, _fake) in IMPLEMENTATIONS.items():
    torch.library.define(f"fastdmd::{_name}", _schema)
    torch.library.impl(f"fastdmd::{_name}", "default", _compute)
    torch.library.register_fake(f"fastdmd::{_name}", _fake)
torch.library.register_autograd("fastdmd::vsa_pool", _pool_backward, setup_context=_pool_setup)
torch.library.register_autograd("fastdmd::vsa_spread", _spread_backward, setup_context=_spread_setup)
torch.library.register_autograd("fastdmd::vsa_fine", _fine_backward, setup_context=_fine_setup)
