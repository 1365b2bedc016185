"""Token order over the post-patch grid (VSA, arXiv 2505.13389): cubes of t x h x w tokens, so that a block of
64 consecutive tokens is a neighbourhood in space and time.

T H W: the grid in tokens. L = T * H * W.
"""

from functools import lru_cache

import torch
from torch import Tensor

Grid = tuple[int, int, int]


@lru_cache(maxsize=64)
def tile_order(grid: Grid, tile: Grid) -> Tensor:
    """Raster indices in tile order, int64 [L] on the host: token j in tile order is raster token `order[j]`.

    Tiles run t, h, w; inside a tile tokens run in raster order. Tiles cut by the grid's edge are smaller:
    the order is compact, nothing is padded. Computed once per grid and cached.
    """
    if min(*grid, *tile) < 1:
        raise ValueError(f"grid {grid} and tile {tile} must be positive")
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    key = torch.zeros(grid, dtype=torch.int64)
    for axis, n, size in zip(axes, grid, tile, strict=True):
        key = key * -(-n // size) + axis // size
    # stable: inside a tile the raster order stays
    return torch.argsort(key.flatten(), stable=True)


@lru_cache(maxsize=64)
def raster_order(grid: Grid, tile: Grid) -> Tensor:
    """The inverse of `tile_order`, int64 [L]: raster token i is token `inverse[i]` in tile order."""
    return torch.argsort(tile_order(grid, tile))
