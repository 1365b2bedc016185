"""Self-attention as an argument of a network's call: one seam for dense, sparse, masked and cached attention.

A module never holds it: a number that a module holds is a compiler's constant, compiled anew at each value.
B batch, L tokens, N heads, K head dim.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastdmd_kernels import video_sparse_attention
from fastdmd_kernels.attention import attention, masked_attention
from fastdmd_kernels.tiles import Tiles


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


@dataclass(frozen=True)
class Cached:
    """A block of tokens from `start` on sees the clean blocks before it and itself; `write` holds it."""

    k: Tensor  # [B, L, N, K] of one layer, for the whole video; the first `start` tokens are held
    v: Tensor
    start: int
    write: bool
    video: Stale

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
        if self.video.is_stale():  # activation checkpointing has come back here from a backward
            raise RuntimeError(
                "the key-value cache was given to another video before the backward of this one; "
                "with activation checkpointing call backward before the next rollout"
            )
        if self.write:
            stop = self.start + k.shape[1]
            self.k[:, self.start : stop].copy_(k)
            self.v[:, self.start : stop].copy_(v)
            return attention(q, self.k[:, :stop], self.v[:, :stop])
        # Copies. Autograd keeps what attention has read until the backward, and by then the context passes of
        # later blocks have written to the buffers: views of them would be refused, since writing to one part
        # of a buffer counts as a change of all of it. What is held has no graph, as it was written without
        # gradient, so gradient reaches the block's own keys and values only. Checkpointing keeps no copy: it
        # comes here again, and finds the same, since a video never writes a token twice.
        held_k, held_v = self.k[:, : self.start], self.v[:, : self.start]
        return attention(q, torch.cat([held_k, k], 1), torch.cat([held_v, v], 1))
