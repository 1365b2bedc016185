"""Block-causal Wan: a video block by block of frames, each of which sees itself and the clean blocks before it
(CausVid 2412.07772, section 4.1; Self-Forcing 2506.08009, section 3.2).

Weights, their names and everything but self-attention are Wan's. B batch, C channel, T frames, H W space, L tokens in
raster order (so frame by frame), N heads, K head dim, D width, n blocks of frames.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from fastdmd.denoiser import Cond
from fastdmd.models.wan.layers import WanConfig, rope_table
from fastdmd.models.wan.net import Wan
from fastdmd_kernels.attention import attention, masked_attention
from fastdmd_kernels.tiles import Grid


class KVCache:
    """Keys, turned by RoPE at their own frames, and values of the clean blocks so far: [B, L, N, K] for each layer.

    It is as long as the whole video from the start, is filled from the front, and serves the next video again.
    """

    def __init__(self, config: WanConfig, B: int, grid: Grid, dtype: torch.dtype, device: torch.device) -> None:
        self.fits = (B, grid, dtype, device)
        self.grid = grid
        shape = (B, math.prod(grid), config.num_attention_heads, config.attention_head_dim)
        self.k, self.v = (
            [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)] for _ in range(2)
        )
        self.tokens = 0  # of the blocks that are held; the next block starts here
        self.video = 0  # how many it has served, with this one

    def restart(self) -> "KVCache":
        self.tokens = 0
        self.video += 1
        return self

    def attend(self, layer: int, start: int, video: int, write: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a block at tokens `start ..` to the clean blocks before it and to itself; `write` holds it."""
        if video != self.video:  # activation checkpointing has come back here from a backward
            raise RuntimeError(
                "the key-value cache was given to another video before the backward of this one; "
                "with activation checkpointing call backward before the next rollout"
            )
        held_k, held_v = self.k[layer], self.v[layer]
        if write:
            stop = start + k.shape[1]
            held_k[:, start:stop].copy_(k)
            held_v[:, start:stop].copy_(v)
            return attention(q, held_k[:, :stop], held_v[:, :stop])
        # Copies. Autograd keeps what attention has read until the backward, and by then the context passes of later
        # blocks have written to the buffers: views of them would be refused, since writing to one part of a buffer
        # counts as a change of all of it. What is held has no graph, as it was written without gradient, so gradient
        # reaches the block's own keys and values only. Checkpointing keeps no copy: it comes here again, and finds the
        # same, since a video never writes a token twice.
        return attention(q, torch.cat([held_k[:, :start], k], 1), torch.cat([held_v[:, :start], v], 1))


@lru_cache(maxsize=1)  # L^2 bytes each
def block_causal_mask(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """bool [L, L], True where query token (row) sees key token: in its own block of tokens or one before."""
    block = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])
    return (block[:, None] >= block).to(device)


def per_token(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """[B, n, ..] -> [B, L, ..], row i for each token of block i."""
    return torch.cat(
        [rows[:, i : i + 1].expand(-1, length, *rows.shape[2:]) for i, length in enumerate(lengths)], dim=1
    )


class CausalWan(Wan):
    """`forward` stays Wan's: of one block that holds all frames.

    A video is made by `start_video`, then for each block of frames some `forward_block`s, the last of which, on the
    clean block, writes to the cache.
    """

    def __init__(self, config: WanConfig, tile: Grid | None = None) -> None:
        if tile is not None:
            raise ValueError(
                "rollout.mode = 'causal' has no sparse attention for the student; set model.attention.student = 'dense'"
            )
        super().__init__(config)
        self._cache: KVCache | None = None

    def start_video(self, shape: Iterable[int]) -> KVCache:
        """An empty cache for videos [B, C, T, H, W]: the one of the video before where it fits, so there is only one
        in memory and a run allocates it once."""
        B, *latent = shape
        weight = self.patch_embedding.weight
        fits = (B, self.grid(latent), weight.dtype, weight.device)
        if self._cache is None or self._cache.fits != fits:
            self._cache = None  # frees the memory before it is taken again
            self._cache = KVCache(self.config, *fits)
        return self._cache.restart()

    def forward_block(self, x_t: Tensor, model_t: Tensor, cond: Cond, cache: KVCache, write: bool = False) -> Tensor:
        """F [B, C, k, H, W] of the k frames x_t that follow those in the cache, at times model_t [B].

        `write` is the context pass: the block's own keys and values stay in the cache, for which gradient has to be
        off. ValueError for a block that does not fit the cache.
        """
        assert not (write and torch.is_grad_enabled())
        grid, start = self.grid(x_t.shape), cache.tokens
        stop = start + math.prod(grid)
        if (len(x_t), *grid[1:]) != (cache.fits[0], *cache.grid[1:]) or stop > math.prod(cache.grid):
            raise ValueError(
                f"a block of B = {len(x_t)}, tokens [T, H, W] = {list(grid)} does not fit a cache of "
                f"B = {cache.fits[0]}, tokens {list(cache.grid)} that holds {start}"
            )
        rope = rope_table(cache.grid, self.config.attention_head_dim, None, x_t.device)[:, start:stop]
        time, modulation, text = self.embed(model_t, cond)
        attends = [partial(cache.attend, i, start, cache.video, write) for i in range(self.config.num_layers)]
        F, _ = self.trunk(x_t, time[:, None], modulation[:, :, None], text, rope, attends)
        if write:
            cache.tokens = stop
        return F

    def forward_blocks(self, x_t: Tensor, model_t: Tensor, cond: Cond, frames: Sequence[int]) -> Tensor:
        """F [B, C, T, H, W] of all blocks in one pass: block i has frames[i] frames and the times model_t[:, i] of
        [B, n], and sees the blocks before it as they are in x_t.

        The same as `forward_block` on each in turn, with each written as it is, but for gradient: here it flows from a
        block into the keys and values of those before. The mask takes L^2 bytes.
        """
        grid, (B, n) = self.grid(x_t.shape), model_t.shape
        pt, *_ = self.config.patch_size
        if n != len(frames) or sum(frames) != x_t.shape[2] or any(k < 1 or k % pt for k in frames):
            raise ValueError(
                f"blocks of {list(frames)} frames do not make up {x_t.shape[2]} frames in {n} times and patches of {pt}"
            )
        lengths = tuple(k // pt * grid[1] * grid[2] for k in frames)
        time, modulation, text = self.embed(model_t.flatten(), cond)
        time = per_token(time.unflatten(0, (B, n)), lengths)
        modulation = per_token(modulation.unflatten(0, (B, n)), lengths).transpose(1, 2)
        rope = rope_table(grid, self.config.attention_head_dim, None, x_t.device)
        attend = partial(masked_attention, mask=block_causal_mask(lengths, x_t.device))
        F, _ = self.trunk(x_t, time, modulation, text, rope, [attend] * self.config.num_layers)
        return F

    def flops(self, shape: Iterable[int], text_tokens: int, cached: int = 0) -> int:
        """As Wan's, of a block that also sees `cached` tokens of the blocks before it."""
        B, *latent = shape
        pairs = math.prod(self.grid(latent)) * cached
        return super().flops((B, *latent), text_tokens) + 4 * B * self.config.num_layers * pairs * self.config.width
