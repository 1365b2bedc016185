"""Self-attention as an argument of a network's call: one seam for dense, sparse, masked and cached attention.

A module never holds it: a number that a module holds is a compiler's constant, compiled anew at each value.
B batch, L tokens, N heads, K head dim.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastdmd_kernels import video_sparse_attention
from fastdmd_kernels.attention import attention, masked_attention
from fastdmd_kernels.tiles import N_VALID_BITS, Grid, Tiles


@dataclass(frozen=True, kw_only=True)
class VSAConfig:
    """[vsa]: video sparse attention (2505.13389) for the roles that `model.attention` gives it."""

    sparsity: float  # share of key tiles that a query tile leaves out; DMD on Wan 1.3B uses 0.8, on 14B 0.9
    warmup_every: int = 0  # steps between rises of the sparsity from 0 on; 0: it is there from the first step
    warmup_step: float = 0.03  # each rise
    tile: Grid = (4, 4, 4)  # tokens, t h w

    def sparsity_at(self, step: int) -> float:
        """Return the sparsity of step `step` (0-based)."""
        rises = step // self.warmup_every if self.warmup_every else math.inf
        return min(self.sparsity, self.warmup_step * rises)

    def problems(self) -> Iterator[tuple[str, str]]:
        if not 0 <= self.sparsity < 1:
            yield "sparsity", f"{self.sparsity} leaves [0, 1); 0 keeps every tile"
        if self.warmup_every < 0:
            yield "warmup_every", f"{self.warmup_every} is negative; 0 is no warm-up"
        if self.warmup_step <= 0:
            yield "warmup_step", f"{self.warmup_step} is not positive; VSA uses 0.03"
        most = (1 << N_VALID_BITS) - 1
        if min(self.tile) < 1 or math.prod(self.tile) > most:
            yield "tile", f"{list(self.tile)} does not hold 1 to {most} tokens; VSA uses [4, 4, 4]"


class Attention(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return [B, L, N, K] for q, k, v [B, L, N, K], q and k turned by RoPE.

        gate: of the sparse attention only.
        """
        ...


@dataclass(frozen=True)
class Dense:
    """Every token sees every other."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
        return attention(q, k, v)


@dataclass(frozen=True)
class Sparse:
    """Video sparse attention (2505.13389): each tile of queries sees the `topk` tiles that suit it best."""

    tiles: Tiles
    topk: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
        return video_sparse_attention(q, k, v, gate, self.tiles, self.topk)


@dataclass(frozen=True)
class Masked:
    """A query (row) sees the keys (columns) where the mask, bool [L, L], is True."""

    mask: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
        return masked_attention(q, k, v, self.mask)


class Stale(Protocol):
    """A video in a cache."""

    def is_stale(self) -> bool:
        """Return whether the cache was given to another video."""
        ...


@dataclass
class Cached:
    """A block of tokens sees the clean blocks before it and itself.

    What is held comes as tensors, whose length a compiler can leave open, and not as a place in a buffer.
    """

    held: tuple[Tensor, Tensor] | None  # of the blocks before: keys and values [B, start, N, K] of one layer
    keeps: bool  # whether `own` is wanted
    video: Stale
    own: tuple[Tensor, Tensor] | None = None  # keys and values of this block, after a call that keeps them

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
        if self.video.is_stale():  # activation checkpointing has come back here from a backward
            raise RuntimeError(
                "the key-value cache was given to another video before the backward of this one; "
                "with activation checkpointing call backward before the next rollout"
            )
        if self.keeps:
            self.own = k, v
        if self.held is None:
            return attention(q, k, v)
        # Copies. Autograd keeps what attention has read until the backward, and by then the context passes of
        # later blocks have written to the buffers: views of them would be refused, since writing to one part
        # of a buffer counts as a change of all of it. What is held has no graph, as it was written without
        # gradient, so gradient reaches the block's own keys and values only. Checkpointing keeps no copy: it
        # comes here again, and finds the same, since a video never writes a token twice.
        held_k, held_v = self.held
        return attention(q, torch.cat([held_k, k], 1), torch.cat([held_v, v], 1))
