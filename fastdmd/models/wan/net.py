"""Wan 2.1 text-to-video DiT (arXiv 2503.20314), with the names of `diffusers.WanTransformer3DModel`.

B batch, C channel, T frames, H W space, L tokens, D width, N heads, K head dim, S text tokens. M is 1 where
one time holds for all tokens of a sample, L where each token has its own.

Tokens are put in one fixed order at the patch embedding and leave it at the end: raster, or tile order in a
call whose self-attention is video sparse attention. No attention sees the order, as the RoPE table is
in the same one.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from fastdmd.batch import Cond
from fastdmd.models.attention import Attention, Sparse
from fastdmd.models.lora import base_of, linear, own
from fastdmd.models.net import PLAIN, Call, Checkpointing, Net, Out
from fastdmd.models.walk import run_block
from fastdmd.models.wan.layers import DENSE, Block, ConditionEmbedder, WanConfig, layer_norm, rope_table
from fastdmd_kernels import topk_for
from fastdmd_kernels.attention import prepare as prepare_attention
from fastdmd_kernels.norm import prepare as prepare_norm
from fastdmd_kernels.tiles import Grid, Tiles


class Geometry(NamedTuple):
    """What calls on one token grid share."""

    tiles: Tiles | None  # of sparse attention
    rope: Tensor  # float32 [2, L, 1, K], in token order


class Wan(Net):
    """A role's network: x_t [B, C, T, H, W], model_t [B] (1000 t), text [B, S, text_dim] -> F = v.

    With a `tile`, self-attention can be video sparse attention over cubes of that many tokens: it is where a
    call has the attention of `attention`, and dense where it has none.
    """

    # what diffusers keeps in float32
    float32 = ("time_embedder", "norm2", "scale_shift_table")

    def __init__(self, config: WanConfig, tile: Grid | None = None) -> None:
        super().__init__()
        self.config, self.tile = config, tile
        self.geometries: dict[tuple[Grid, torch.device, bool], Geometry] = {}
        D = config.width
        self.widths = (D,) * config.num_layers
        # a Conv3d for its name and shape only: patches do not overlap, so it is applied as a matrix product
        self.patch_embedding = nn.Conv3d(config.in_channels, D, config.patch_size, stride=config.patch_size)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config, gated=tile is not None) for _ in range(config.num_layers))
        self.proj_out = nn.Linear(D, config.out_channels * math.prod(config.patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, D) / D**0.5)

    @torch.no_grad()
    def start_from_scratch(self) -> Self:
        """Set random weights to train from: open residual gates, and random q and k biases.

        With RoPE the biases give a head a kernel over token offsets, sum_i q_i k_i cos(w_i d), from the first
        step. The tiny teacher was trained so; what each of the two is worth was not measured apart.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            block.scale_shift_table[:, [2, 5]] = 1.0
            for projection in (block.attn1.to_q, block.attn1.to_k):
                projection.bias.normal_()
            for norm in (block.attn1.norm_q, block.attn1.norm_k):
                norm.weight.fill_(2.0)
        return self

    def recompute_blocks(self, how: Checkpointing) -> None:
        super().recompute_blocks(how)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.selective = how == "selective"

    def chunk_feed_forward(self, chunks: int) -> None:
        for block in self.blocks:
            assert isinstance(block, Block)
            block.ffn.chunks = chunks

    def grid(self, shape: Iterable[int]) -> Grid:
        """Return the tokens (T, H, W) of a latent [.., C, T, H, W]; ValueError when patches do not fit."""
        *_, C, T, H, W = shape
        pt, ph, pw = self.config.patch_size
        if self.config.in_channels != C or T % pt or H % ph or W % pw:
            raise ValueError(
                f"latent [C, T, H, W] = {[C, T, H, W]} does not fit {self.config.in_channels} channels and "
                f"patches {list(self.config.patch_size)}"
            )
        return T // pt, H // ph, W // pw

    def prepare(
        self, shape: Sequence[int], device: torch.device, dtype: torch.dtype, dense: bool = False
    ) -> None:
        """Make the tables of latents [B, C, T, H, W], and choose the dense attention and the norms."""
        for is_tiled in {self.tile is not None, self.tile is not None and not dense}:
            self.geometry(self.grid(shape), device, is_tiled)
        prepare_attention(device, dtype, self.config.attention_head_dim)
        prepare_norm("rms_norm", device, dtype, (self.config.width,))
        prepare_norm("layer_norm", device, torch.float32, (self.config.width,))

    def geometry(self, grid: Grid, device: torch.device, is_tiled: bool) -> Geometry:
        """Return the tables of a token grid in tile or raster order; they are made when first asked for."""
        known = self.geometries.get((grid, device, is_tiled))
        if known is None:
            tiles = Tiles(grid, self.tile) if is_tiled and self.tile is not None else None
            if tiles is not None:
                tiles.on(device)  # its tensors too are made here
            with torch.inference_mode(False):  # whose tensors autograd could not save later
                known = Geometry(tiles, rope_table(grid, self.config.attention_head_dim, tiles, device))
            self.geometries[grid, device, is_tiled] = known
        return known

    def topk(self, shape: Iterable[int], sparsity: float) -> int | None:
        """Return how many key tiles a query tile keeps of a latent [.., C, T, H, W]; None when dense."""
        return None if self.tile is None else topk_for(sparsity, Tiles(self.grid(shape), self.tile).n)

    def attention(self, shape: Iterable[int], topk: int | None) -> Sparse | None:
        """Return the sparse attention of a latent [.., C, T, H, W]; None when attention is dense."""
        if self.tile is None:
            return None
        tiles = self.geometry(self.grid(shape), self.scale_shift_table.device, True).tiles
        assert tiles is not None
        assert topk is not None
        return Sparse(tiles, topk)

    def patchify(self, x_t: Tensor, grid: Grid) -> Tensor:
        """Return the patches [B, L, C * prod(patch)] of x_t [B, C, T, H, W], in raster order."""
        (gt, gh, gw), (pt, ph, pw) = grid, self.config.patch_size
        x = x_t.reshape(*x_t.shape[:2], gt, pt, gh, ph, gw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return x.reshape(x_t.shape[0], gt * gh * gw, -1)

    def unpatchify(self, x: Tensor, grid: Grid) -> Tensor:
        """Return [B, C, T, H, W] from [B, L, prod(patch) * C] in raster order."""
        (gt, gh, gw), (pt, ph, pw) = grid, self.config.patch_size
        x = x.reshape(x.shape[0], gt, gh, gw, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(*x.shape[:2], gt * pt, gh * ph, gw * pw)

    def forward(self, x_t: Tensor, model_t: Tensor, cond: Cond, call: Call = PLAIN) -> Out:
        """Return v, and the hidden states [B, D, T, H, W] on the token grid after `call.layers`."""
        assert call.cache is None, "no causal network"
        assert not call.blocks, "no causal network"
        geometry = self.geometry(self.grid(x_t.shape), x_t.device, isinstance(call.attention, Sparse))
        time, modulation, text = self.embed(model_t, cond, call.role)
        attentions = [call.attention or DENSE] * len(self.blocks)
        return self.trunk(x_t, time[:, None], modulation[:, :, None], text, geometry, attentions, call)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the hidden states."""
        return base_of(self.patch_embedding).weight.dtype

    def embed(self, model_t: Tensor, cond: Cond, role: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return time [B, D], block modulation [B, 6, D] and text [B, S, D] of times [B] and a condition."""
        return own(self.condition_embedder, role)(model_t, cond.text.to(self.dtype), role)

    def trunk(
        self,
        x_t: Tensor,
        time: Tensor,
        modulation: Tensor,
        text: Tensor,
        geometry: Geometry,
        attentions: Iterable[Attention],
        call: Call,
    ) -> Out:
        """Return what `forward` does, from embedded conditions and the attention of each block.

        x_t [B, C, T, H, W], time [B, M, D], modulation [B, 6, M, D], text [B, S, D].
        """
        grid, role = self.grid(x_t.shape), call.role
        maps: list[Tensor] = []
        patches, tiles = self.patchify(x_t, grid), geometry.tiles
        if tiles is not None:
            patches = tiles.to_tile_order(patches, 1)
        x: Tensor = linear(self.patch_embedding, patches.to(self.dtype), role)
        for index, (block, attention) in enumerate(zip(self.blocks, attentions, strict=True)):
            x = run_block(self, index, block, x, text, modulation, geometry.rope, attention, role)
            if index in call.layers:
                raster = x if tiles is None else tiles.to_raster_order(x, 1)
                maps.append(raster.float().transpose(1, 2).reshape(len(x), -1, *grid))
        shift, scale = (self.scale_shift_table[:, :, None] + time[:, None]).unbind(1)  # [B, M, D]
        x = linear(self.proj_out, (layer_norm(x, self.config.eps) * (1 + scale) + shift).to(x.dtype), role)
        if tiles is not None:
            x = tiles.to_raster_order(x, 1)
        return Out(self.unpatchify(x, grid), maps)

    def flops(self, shape: Iterable[int], text_tokens: int, call: Call = PLAIN) -> int:
        """Return multiply-adds x 2 of products and attention in one forward of a latent [B, C, T, H, W]."""
        B, *latent = shape
        S = text_tokens
        D = self.config.width
        c = self.config
        L, patch = math.prod(self.grid(latent)), math.prod(c.patch_size)
        own = 5 if isinstance(call.attention, Sparse) else 4  # of self-attention; the gate is one more
        block = L * (own + 2) * D * D + S * 2 * D * D + 2 * L * D * c.ffn_dim
        ends = L * D * patch * (c.in_channels + c.out_channels) + S * (c.text_dim + D) * D
        time = c.freq_dim * D + 7 * D * D
        products = 2 * B * (c.num_layers * block + ends + time)
        return products + self.attention_flops((B, *latent), text_tokens, call)

    def attention_flops(self, shape: Iterable[int], text_tokens: int, call: Call = PLAIN) -> int:
        """Return those of scores and of what they weigh, of both attentions, in one forward."""
        B, *latent = shape
        L = math.prod(self.grid(latent))
        pairs = L * L
        if isinstance(
            call.attention, Sparse
        ):  # tiles are multiplied whole; the coarse branch has one token a tile
            tiles = call.attention.tiles
            pairs = tiles.n * call.attention.topk * tiles.slots**2 + tiles.n**2
        return 4 * B * self.config.num_layers * (pairs + L * text_tokens) * self.config.width
