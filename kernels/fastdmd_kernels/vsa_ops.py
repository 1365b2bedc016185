"""The stages of video sparse attention as registered ops: torch.compile passes over them, autograd goes through them.

B batch, L tokens in tile order (Lq, Lk), N heads, K head dim, n tiles (nq, nk). Geometry crosses into an op as numbers:
its tensors are looked up inside, where nothing traces them. Every output is contiguous.
"""

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastdmd_kernels import dispatch
from fastdmd_kernels.tiles import Tiles

Ints = Sequence[int]

GPU_SLOTS = 64  # the kernels' blocks; no log-sum-exp has fewer slots either


def pool(x: Tensor, tiles: Tiles) -> Tensor:
    """Tile means of x [B, L, N, K] -> float32 (float64 for float64) [B, N, n, K]; gradient to x."""
    return torch.ops.fastdmd.vsa_pool(x, tiles.grid, tiles.tile, True)


def spread(x: Tensor, tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """A tile's row to each of its tokens, x [B, N, n, K] -> [B, L, N, K] in `dtype`; gradient to x."""
    return torch.ops.fastdmd.vsa_spread(x, tiles.grid, tiles.tile, False, dtype)


def select(q_c: Tensor, k_c: Tensor, k_tiles: Tiles, topk: int) -> Tensor:
    """The topk key tiles of highest q_c k_c^T per query tile, ties to the lowest index.

    q_c [B, N, nq, K], k_c [B, N, nk, K], float32 -> int32 [B, N, nq, topk], ascending: (row_start << 7) | n_valid.
    """
    return torch.ops.fastdmd.vsa_select(q_c, k_c, k_tiles.grid, k_tiles.tile, topk)


def fine(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, q_tiles: Tiles, k_tiles: Tiles) -> Tensor:
    """Attention of each tile's queries over the tiles of its list, [B, Lq, N, K]; gradients to q, k, v."""
    return torch.ops.fastdmd.vsa_fine(q, k, v, lists, q_tiles.grid, k_tiles.grid, q_tiles.tile)[0]


def _tiles(grid: Ints, tile: Ints) -> Tiles:
    (T, H, W), (t, h, w) = grid, tile
    return Tiles((T, H, W), (t, h, w))


def _stages(device: torch.device, tile: Ints) -> ModuleType:
    if dispatch.backend(device) == "triton" and math.prod(tile) > GPU_SLOTS:
        raise ValueError(f"tile {tuple(tile)} has {math.prod(tile)} slots, the triton kernels take {GPU_SLOTS}")
    return dispatch.module("vsa", device)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------ pool, spread
# The transpose of a mean over tiles is a spread of shares, and that of a spread is a sum: two ops, each the other's
# backward.


def _pool(x: Tensor, grid: Ints, tile: Ints, mean: bool) -> Tensor:
    """Means or sums."""
    geometry = _tiles(grid, tile).on(x.device)
    # the gradient of a sum is expanded, with strides of 0
    x = x if x.stride(-1) == 1 else x.contiguous()
    means = _stages(x.device, tile).pool(x, geometry.row_start, geometry.n_valid)
    return means if mean else means * geometry.n_valid[:, None]


def _pool_fake(x: Tensor, grid: Ints, tile: Ints, mean: bool) -> Tensor:
    B, _, N, K = x.shape
    return x.new_empty(B, N, _tiles(grid, tile).n, K, dtype=_at_least_float32(x.dtype))


def _pool_setup(ctx, inputs, output) -> None:
    x, ctx.grid, ctx.tile, ctx.mean = inputs
    ctx.dtype = x.dtype


def _pool_backward(ctx, dout: Tensor):
    return torch.ops.fastdmd.vsa_spread(dout, ctx.grid, ctx.tile, ctx.mean, ctx.dtype), None, None, None


def _spread(x: Tensor, grid: Ints, tile: Ints, mean: bool, dtype: torch.dtype) -> Tensor:
    """The tile's row to each token, or the token's share of it."""
    geometry = _tiles(grid, tile).on(x.device)
    x = x / geometry.n_valid[:, None] if mean else x
    return x.to(dtype).transpose(1, 2).contiguous().index_select(1, geometry.tile_of_row)


def _spread_fake(x: Tensor, grid: Ints, tile: Ints, mean: bool, dtype: torch.dtype) -> Tensor:
    B, N, _, K = x.shape
    return x.new_empty(B, _tiles(grid, tile).L, N, K, dtype=dtype)


def _spread_setup(ctx, inputs, output) -> None:
    x, ctx.grid, ctx.tile, ctx.mean, _ = inputs
    ctx.dtype = x.dtype


def _spread_backward(ctx, dout: Tensor):
    dx = torch.ops.fastdmd.vsa_pool(dout, ctx.grid, ctx.tile, ctx.mean)
    return dx.to(ctx.dtype), None, None, None, None


# ------------------------------------------------------------------------------------------------------------ select


def _select(q_c: Tensor, k_c: Tensor, grid_k: Ints, tile: Ints, topk: int) -> Tensor:
    geometry = _tiles(grid_k, tile).on(k_c.device)
    return _stages(q_c.device, tile).select(q_c, k_c, geometry.row_start, geometry.n_valid, topk)


def _select_fake(q_c: Tensor, k_c: Tensor, grid_k: Ints, tile: Ints, topk: int) -> Tensor:
    return q_c.new_empty(*q_c.shape[:3], topk, dtype=torch.int32)


# -------------------------------------------------------------------------------------------------------------- fine


def _fine(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, grid_q: Ints, grid_k: Ints, tile: Ints
) -> tuple[Tensor, Tensor]:
    """(out [B, Lq, N, K], log-sum-exp [B, N, nq, slots], base 2, for the backward)."""
    geometry = _tiles(grid_q, tile).on(q.device)
    return _stages(q.device, tile).fine_fwd(q, k, v, lists, geometry.row_start, geometry.n_valid)


def _fine_fake(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, grid_q: Ints, grid_k: Ints, tile: Ints
) -> tuple[Tensor, Tensor]:
    slots = max(GPU_SLOTS, math.prod(map(min, grid_q, tile)))
    return q.new_empty(q.shape), q.new_empty(*lists.shape[:3], slots, dtype=_at_least_float32(q.dtype))


def _fine_setup(ctx, inputs, output) -> None:
    q, k, v, lists, ctx.grid_q, ctx.grid_k, ctx.tile = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, lists)


def _fine_backward(ctx, dout: Tensor, _):
    dq, dk, dv = torch.ops.fastdmd.vsa_fine_backward(dout, *ctx.saved_tensors, ctx.grid_q, ctx.grid_k, ctx.tile)
    return dq, dk, dv, None, None, None, None


def _fine_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Tensor,
    grid_q: Ints,
    grid_k: Ints,
    tile: Ints,
) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k = _tiles(grid_q, tile).on(q.device), _tiles(grid_k, tile).on(q.device)
    # the gradient of a sum is expanded, with strides of 0
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    return _stages(q.device, tile).fine_bwd(
        dout, q, k, v, out, lse, lists, of_q.row_start, of_q.n_valid, of_k.row_start, of_k.n_valid
    )


def _fine_gradients_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Tensor,
    grid_q: Ints,
    grid_k: Ints,
    tile: Ints,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# ------------------------------------------------------------------------------------------------------ registration

IMPLEMENTATIONS = {  # name -> schema, what computes it, what says its shapes
    "vsa_pool": ("(Tensor x, int[] grid, int[] tile, bool mean) -> Tensor", _pool, _pool_fake),
    "vsa_spread": (
        "(Tensor x, int[] grid, int[] tile, bool mean, ScalarType dtype) -> Tensor",
        _spread,
        _spread_fake,
    ),
    "vsa_select": ("(Tensor q_c, Tensor k_c, int[] grid_k, int[] tile, SymInt topk) -> Tensor", _select, _select_fake),
    "vsa_fine": (
        "(Tensor q, Tensor k, Tensor v, Tensor lists, int[] grid_q, int[] grid_k, int[] tile) -> (Tensor, Tensor)",
        _fine,
        _fine_fake,
    ),
    "vsa_fine_backward": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor lists, int[] grid_q, int[] grid_k,"
        " int[] tile) -> (Tensor, Tensor, Tensor)",
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
