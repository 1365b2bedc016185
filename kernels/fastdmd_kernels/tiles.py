"""Token order over the post-patch grid (VSA, arXiv 2505.13389): cubes of t x h x w tokens.

A block of 64 consecutive tokens is then a neighbourhood in space and time. T H W: the grid in tokens. L = T *
H * W tokens in n tiles; a tile has `slots` places, its first n_valid are used.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int, int]

CUBE: Grid = (4, 4, 4)

# attention lists name a key tile by one int32 word, (row_start << N_VALID_BITS) | n_valid
N_VALID_BITS = 7


def _check(grid: Grid, tile: Grid) -> None:
    if len(grid) != 3 or len(tile) != 3 or min(*grid, *tile) < 1:
        raise ValueError(f"grid {grid} and tile {tile} must be three positive numbers each")


def _tile_of_raster(grid: Grid, tile: Grid) -> Tensor:
    """Return the tile of each raster token, int64 [L]; tiles run t, h, w."""
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    index = torch.zeros(grid, dtype=torch.int64)
    for axis, n, size in zip(axes, grid, tile, strict=True):
        index = index * -(-n // size) + axis // size
    return index.flatten()


def tile_order(grid: Grid, tile: Grid) -> Tensor:
    """Return the raster indices in tile order, int64 [L] on the host.

    Token j in tile order is raster token `order[j]`. Tiles run t, h, w; inside a tile tokens run in raster
    order. Tiles cut by the grid's edge are smaller: the order is compact, nothing is padded.
    """
    _check(grid, tile)
    # stable: inside a tile the raster order stays
    return torch.argsort(_tile_of_raster(grid, tile), stable=True)


def raster_order(grid: Grid, tile: Grid) -> Tensor:
    """Return the inverse of `tile_order`, int64 [L]: raster token i is token `inverse[i]` in tile order."""
    return torch.argsort(tile_order(grid, tile))


class TileTensors(NamedTuple):
    """Hold a geometry on one device: tile i owns n_valid[i] rows from row_start[i] on, in tile order."""

    row_start: Tensor  # int32 [n]
    n_valid: Tensor  # int32 [n], 1..slots
    tile_of_row: Tensor  # int64 [L]
    order: Tensor  # int64 [L], tile_order
    inverse: Tensor  # int64 [L], raster_order


def _tensors(grid: Grid, tile: Grid, device: torch.device) -> TileTensors:
    # a first call may come from inside inference_mode, whose tensors autograd could not save later
    with torch.inference_mode(False):
        order = tile_order(grid, tile)
        tile_of_row = _tile_of_raster(grid, tile)[order]
        n_valid = torch.ones(1, dtype=torch.int64)
        for n, size in zip(grid, tile, strict=True):  # not bincount: its shape would depend on values
            on_axis = torch.tensor([min(size, n - start) for start in range(0, n, size)])
            n_valid = (n_valid[:, None] * on_axis).flatten()
        row_start = n_valid.cumsum(0) - n_valid
        host = (row_start.int(), n_valid.int(), tile_of_row, order, torch.argsort(order))
        return TileTensors(*(x.to(device) for x in host))


@dataclass(frozen=True)
class Tiles:
    """Describe a grid (T, H, W) of tokens cut in cubes.

    Tiles at the grid's edge are smaller, nothing is padded. Two of the same grid and tile are equal. The
    tensors (`on`) belong to the instance: keep one per grid, and call `on(device)` before a graph is compiled
    or captured, which takes them as inputs then.
    """

    grid: Grid
    tile: Grid = CUBE
    _on: dict[torch.device, TileTensors] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self.grid, self.tile)

    @property
    def L(self) -> int:
        """Return the number of tokens."""
        return math.prod(self.grid)

    @property
    def n(self) -> int:
        """Return the number of tiles."""
        (T, H, W), (t, h, w) = self.grid, self.tile
        return -(-T // t) * -(-H // h) * -(-W // w)

    @property
    def slots(self) -> int:
        """Return the number of places of a tile."""
        return math.prod(self.tile)

    @property
    def fullest(self) -> int:
        """Return the number of tokens of the fullest tile."""
        (T, H, W), (t, h, w) = self.grid, self.tile
        return min(t, T) * min(h, H) * min(w, W)

    def on(self, device: torch.device) -> TileTensors:
        """Return the tensors of this geometry; the first call of an instance makes them."""
        if device not in self._on:
            self._on[device] = _tensors(self.grid, self.tile, device)
        return self._on[device]

    def to_tile_order(self, x: Tensor, dim: int) -> Tensor:
        """Move the tokens of x along `dim` from raster to tile order.

        It is the same for embeddings, RoPE tables, gates and masks.
        """
        self._check_length(x, dim)
        return x.index_select(dim, self.on(x.device).order)

    def to_raster_order(self, x: Tensor, dim: int) -> Tensor:
        """Move the tokens of x along `dim` from tile to raster order."""
        self._check_length(x, dim)
        return x.index_select(dim, self.on(x.device).inverse)

    def _check_length(self, x: Tensor, dim: int) -> None:
        if x.shape[dim] != self.L:
            raise ValueError(
                f"dimension {dim} of {list(x.shape)} is not the {self.L} tokens of grid {self.grid}"
            )
