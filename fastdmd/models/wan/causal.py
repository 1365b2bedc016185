"""Block-causal Wan: a video made block by block of frames (CausVid 2412.07772; Self-Forcing 2506.08009).

Each block sees itself and the clean blocks before it (CausVid, section 4.1; Self-Forcing, section 3.2).
Weights, their names and everything but self-attention are Wan's. B batch, C channel, T frames, H W space, L
tokens in raster order (so frame by frame), N heads, K head dim, D width, n blocks of frames.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastdmd.batch import Cond
from fastdmd.models.attention import Cached, Masked
from fastdmd.models.net import PLAIN, Call, Out
from fastdmd.models.wan.layers import WanConfig
from fastdmd.models.wan.net import Geometry, Wan
from fastdmd_kernels.tiles import Grid


class KVCache:
    """Keys and values of the clean blocks so far: [B, L, N, K] for each layer.

    Keys are turned by RoPE at their own frames. The cache is as long as the whole video from the start, is
    filled from the front, and serves the next video again.
    """

    def __init__(
        self, config: WanConfig, B: int, grid: Grid, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.fits = (B, grid, dtype, device)
        self.grid = grid
        shape = (B, math.prod(grid), config.num_attention_heads, config.attention_head_dim)
        self.k, self.v = (
            [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
            for _ in range(2)
        )
        self.current: Video | None = None  # that it serves

    def start(self) -> "Video":
        """Return an empty cache for a video, and forget the one before."""
        self.current = Video(self)
        return self.current


class Video:
    """One video in the cache: how many of its tokens are held."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.tokens = 0  # of the blocks that are held; the next block starts here

    def is_stale(self) -> bool:
        """Return whether the cache was given to another video."""
        return self.cache.current is not self

    def attentions(self, write: bool) -> Iterator[Cached]:
        """Yield how each layer's next block of tokens attends; `write` holds its keys and values after."""
        for k, v in zip(self.cache.k, self.cache.v, strict=True):
            held = (self.first(k), self.first(v)) if self.tokens else None
            seam = Cached(held, write, self)
            yield seam
            if seam.own is not None:
                stop = self.tokens + seam.own[0].shape[1]
                for buffer, own in zip((k, v), seam.own, strict=True):
                    buffer[:, self.tokens : stop].copy_(own)

    def first(self, buffer: Tensor) -> Tensor:
        """Return the part of a buffer that is held; compiled code is the same for all lengths of it."""
        held = buffer[:, : self.tokens]
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_dynamic(held, 1)  # pyright: ignore[reportPrivateUsage]
        return held


def block_causal_mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return bool [L, L], True where a query token (row) sees a key token: in its own block or one before."""
    block = torch.cat([torch.full((length,), i, device=device) for i, length in enumerate(lengths)])
    return block[:, None] >= block


def per_token(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Repeat row i of [B, n, ..] for each token of block i -> [B, L, ..]."""
    return torch.cat(
        [rows[:, i : i + 1].expand(-1, length, *rows.shape[2:]) for i, length in enumerate(lengths)], dim=1
    )


class CausalWan(Wan):
    """A Wan that can make a video block by block.

    `start_video`, then for each block of frames some calls with that cache, the last of which, on the clean
    block, writes to it.
    """

    def __init__(self, config: WanConfig, tile: Grid | None = None) -> None:
        if tile is not None:
            raise ValueError(
                "rollout.mode = 'causal' has no sparse attention for the student; "
                "set model.attention.student = 'dense'"
            )
        super().__init__(config)
        self._cache: KVCache | None = None

    def prepare(
        self, shape: Sequence[int], device: torch.device, dtype: torch.dtype, dense: bool = False
    ) -> None:
        """Make the tables and the cache of videos [B, C, T, H, W], and choose the dense attention."""
        super().prepare(shape, device, dtype, dense)
        self.start_video(shape)

    def geometry(self, grid: Grid, device: torch.device, is_tiled: bool = False) -> Geometry:
        """Return the tables of a token grid: of the beginning of a longer video, the beginning of its own."""
        for (known, where, _), geometry in self.geometries.items():
            if where == device and known[1:] == grid[1:] and known[0] >= grid[0]:
                return geometry._replace(rope=geometry.rope[:, : math.prod(grid)])
        return super().geometry(grid, device, is_tiled)

    def start_video(self, shape: Iterable[int]) -> Video:
        """Return an empty cache for videos [B, C, T, H, W].

        It is the one of the video before where that fits: only one is in memory, allocated once per run.
        """
        B, *latent = shape
        fits = (B, self.grid(latent), self.dtype, self.scale_shift_table.device)
        if self._cache is None or self._cache.fits != fits:
            self._cache = None  # frees the memory before it is taken again
            self._cache = KVCache(self.config, *fits)
        return self._cache.start()

    def forward(self, x_t: Tensor, model_t: Tensor, cond: Cond, call: Call = PLAIN) -> Out:
        """Return v: of one block that holds all frames, of the block after a cache, or of all blocks at once.

        `call.cache`: x_t [B, C, k, H, W] are the k frames after those in the cache, at times model_t [B].
        `call.write` is the context pass, for which gradient has to be off.
        `call.blocks`: block i has blocks[i] frames and the times model_t[:, i] of [B, n], and sees the blocks
        before it as they are in x_t. It is the same as a call on each in turn, with each written as it is,
        but for gradient: here it flows from a block into the keys and values of those before. The mask takes
        L^2 bytes.
        """
        if call.cache is not None:
            return self._block(x_t, model_t, cond, call.cache, call)
        if call.blocks:
            return self._blocks(x_t, model_t, cond, call)
        return super().forward(x_t, model_t, cond, call)

    def _block(self, x_t: Tensor, model_t: Tensor, cond: Cond, video: Video, call: Call) -> Out:
        assert not (call.write and torch.is_grad_enabled())
        grid = self.grid(x_t.shape)
        start = video.tokens
        cache = video.cache
        stop = start + math.prod(grid)
        if (len(x_t), *grid[1:]) != (cache.fits[0], *cache.grid[1:]) or stop > math.prod(cache.grid):
            raise ValueError(
                f"a block of B = {len(x_t)}, tokens [T, H, W] = {list(grid)} does not fit a cache of "
                f"B = {cache.fits[0]}, tokens {list(cache.grid)} that holds {start}"
            )
        whole = self.geometry(cache.grid, x_t.device)
        geometry = whole._replace(rope=whole.rope[:, start:stop])
        time, modulation, text = self.embed(model_t, cond, call.role)
        attentions = video.attentions(call.write)
        out = self.trunk(x_t, time[:, None], modulation[:, :, None], text, geometry, attentions, call)
        if call.write:
            video.tokens = stop
        return out

    def _blocks(self, x_t: Tensor, model_t: Tensor, cond: Cond, call: Call) -> Out:
        grid = self.grid(x_t.shape)
        B, n = model_t.shape
        frames = call.blocks
        pt, *_ = self.config.patch_size
        if n != len(frames) or sum(frames) != x_t.shape[2] or any(k < 1 or k % pt for k in frames):
            raise ValueError(
                f"blocks of {list(frames)} frames do not make up {x_t.shape[2]} frames in {n} times "
                f"and patches of {pt}"
            )
        lengths = tuple(k // pt * grid[1] * grid[2] for k in frames)
        time, modulation, text = self.embed(model_t.flatten(), cond, call.role)
        time = per_token(time.view(B, n, *time.shape[1:]), lengths)
        modulation = per_token(modulation.view(B, n, *modulation.shape[1:]), lengths).transpose(1, 2)
        attentions = [Masked(block_causal_mask(lengths, x_t.device))] * self.config.num_layers
        geometry = self.geometry(grid, x_t.device)
        return self.trunk(x_t, time, modulation, text, geometry, attentions, call)

    def attention_flops(self, shape: Iterable[int], text_tokens: int, call: Call = PLAIN) -> int:
        """Return what Wan's does, of a block that also sees the tokens of the blocks in the cache."""
        B, *latent = shape
        flops = super().attention_flops((B, *latent), text_tokens, call)
        if call.cache is None:
            return flops
        pairs = math.prod(self.grid(latent)) * call.cache.tokens
        return flops + 4 * B * self.config.num_layers * pairs * self.config.width
