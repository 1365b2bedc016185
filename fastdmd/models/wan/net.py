"""Wan 2.1 text-to-video DiT (arXiv 2503.20314), with the state-dict names of `diffusers.WanTransformer3DModel`.

B batch, C channel, T frames, H W space, L tokens, D width, N heads, K head dim, S text tokens. M is 1 where one time
holds for all tokens of a sample, L where each token has its own.

Tokens are put in one fixed order at the patch embedding and leave it at the end: raster, or tile order when `tile` is
set and self-attention is video sparse attention. No attention sees the order, as the RoPE table is in the same one.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdmd.denoiser import Cond
from fastdmd.models.wan.layers import Attend, Block, ConditionEmbedder, Sparse, WanConfig, layer_norm, rope_table
from fastdmd_kernels import topk_for
from fastdmd_kernels.attention import attention, prepare
from fastdmd_kernels.tiles import N_VALID_BITS, Grid, Tiles


@dataclass(frozen=True, kw_only=True)
class VSAConfig:
    """[vsa]: video sparse attention (2505.13389) for the roles that `model.attention` gives it."""

    sparsity: float  # share of key tiles that a query tile leaves out; DMD on Wan 1.3B uses 0.8, on 14B 0.9
    warmup_every: int = 0  # steps between rises of the sparsity from 0 on; 0: it is there from the first step
    warmup_step: float = 0.03  # each rise
    tile: Grid = (4, 4, 4)  # tokens, t h w

    def sparsity_at(self, step: int) -> float:
        """The sparsity of step `step` (0-based)."""
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


class Wan(nn.Module):
    """A role's network: x_t [B, C, T, H, W], model_t [B] (1000 t), text [B, S, text_dim] -> F = v [B, C, T, H, W].

    With a `tile`, self-attention is video sparse attention over cubes of that many tokens, at `sparsity`.
    """

    def __init__(self, config: WanConfig, tile: Grid | None = None) -> None:
        super().__init__()
        self.config, self.tile = config, tile
        self.sparsity = 0.0  # of the step; the trainer's to set
        self.checkpointing = False
        D = config.width
        # a Conv3d for its name and shape only: patches do not overlap, so it is applied as a matrix product
        self.patch_embedding = nn.Conv3d(config.in_channels, D, config.patch_size, stride=config.patch_size)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config, gated=tile is not None) for _ in range(config.num_layers))
        self.proj_out = nn.Linear(D, config.out_channels * math.prod(config.patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, D) / D**0.5)

    @torch.no_grad()
    def start_from_scratch(self) -> "Wan":
        """Random weights to train from: open residual gates, and random q and k biases.

        With RoPE the biases give a head a kernel over token offsets, sum_i q_i k_i cos(w_i d), from the first step. The
        tiny teacher was trained so; what each of the two is worth was not measured apart.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            block.scale_shift_table[:, [2, 5]] = 1.0
            for linear in (block.attn1.to_q, block.attn1.to_k):
                linear.bias.normal_()
            for norm in (block.attn1.norm_q, block.attn1.norm_k):
                norm.weight.fill_(2.0)
        return self

    def grid(self, shape: Iterable[int]) -> Grid:
        """Tokens (T, H, W) of a latent [.., C, T, H, W]; ValueError when patches do not fit."""
        *_, C, T, H, W = shape
        pt, ph, pw = self.config.patch_size
        if self.config.in_channels != C or T % pt or H % ph or W % pw:
            raise ValueError(
                f"latent [C, T, H, W] = {[C, T, H, W]} does not fit {self.config.in_channels} channels and patches "
                f"{list(self.config.patch_size)}"
            )
        return T // pt, H // ph, W // pw

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each block."""
        return (self.config.width,) * self.config.num_layers

    def sparse(self, grid: Grid) -> Sparse | None:
        """What sparse attention needs to know of a grid; None when attention is dense."""
        if self.tile is None:
            return None
        tiles = Tiles(grid, self.tile)
        return tiles, topk_for(self.sparsity, tiles.n)

    def patchify(self, x_t: Tensor, grid: Grid) -> Tensor:
        """[B, C, T, H, W] -> patches in token order [B, L, C * prod(patch)]."""
        (gt, gh, gw), (pt, ph, pw) = grid, self.config.patch_size
        x = x_t.reshape(*x_t.shape[:2], gt, pt, gh, ph, gw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        x = x.reshape(x_t.shape[0], gt * gh * gw, -1)
        return x if self.tile is None else Tiles(grid, self.tile).to_tile_order(x, 1)

    def unpatchify(self, x: Tensor, grid: Grid) -> Tensor:
        """[B, L, prod(patch) * C] in token order -> [B, C, T, H, W]."""
        if self.tile is not None:
            x = Tiles(grid, self.tile).to_raster_order(x, 1)
        (gt, gh, gw), (pt, ph, pw) = grid, self.config.patch_size
        x = x.reshape(x.shape[0], gt, gh, gw, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(*x.shape[:2], gt * pt, gh * ph, gw * pw)

    def forward(self, x_t: Tensor, model_t: Tensor, cond: Cond) -> Tensor:
        return self.features(x_t, model_t, cond, ())[0]

    def features(
        self, x_t: Tensor, model_t: Tensor, cond: Cond, layers: Collection[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """F, and the hidden states [B, D, T, H, W] (of the token grid, float32) after the blocks of these indices."""
        rope = rope_table(self.grid(x_t.shape), self.config.attention_head_dim, self.tile, x_t.device)
        time, modulation, text = self.embed(model_t, cond)
        attends = [attention] * len(self.blocks)
        return self.trunk(x_t, time[:, None], modulation[:, :, None], text, rope, attends, layers)

    def embed(self, model_t: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        """Times [B] and text -> time [B, D], block modulation [B, 6, D], text [B, S, D]."""
        return self.condition_embedder(model_t, cond.text.to(self.patch_embedding.weight.dtype))

    def trunk(
        self,
        x_t: Tensor,
        time: Tensor,
        modulation: Tensor,
        text: Tensor,
        rope: Tensor,
        attends: Sequence[Attend],
        layers: Collection[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """`features` of x_t [B, C, T, H, W]. time [B, M, D], modulation [B, 6, M, D], text [B, S, D],
        rope [2, L, 1, K], and how each block attends to its q, k, v where attention is dense."""
        grid, found, weight = self.grid(x_t.shape), [], self.patch_embedding.weight
        x = nnf.linear(self.patchify(x_t, grid).to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)
        sparse = self.sparse(grid)
        for index, (block, attend) in enumerate(zip(self.blocks, attends, strict=True)):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, text, modulation, rope, sparse, attend, use_reentrant=False)
            else:
                x = block(x, text, modulation, rope, sparse, attend)
            if index in layers:
                raster = x if self.tile is None else Tiles(grid, self.tile).to_raster_order(x, 1)
                found.append(raster.float().transpose(1, 2).unflatten(2, grid))
        shift, scale = (self.scale_shift_table[:, :, None] + time[:, None]).unbind(1)  # [B, M, D]
        x = (layer_norm(x, self.config.eps) * (1 + scale) + shift).to(x.dtype)
        return self.unpatchify(self.proj_out(x), grid), found

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Choose the dense attention before the first step."""
        prepare(device, dtype, self.config.attention_head_dim)

    def cast(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Round parameters to the compute dtype in place, but for what diffusers keeps in float32: time embedder, norm2
        and modulation. -> the float32 originals of those that were rounded, by name: an optimizer's masters."""
        masters = {}
        for name, parameter in self.named_parameters():
            kept = "time_embedder" in name or "norm2" in name or "scale_shift_table" in name
            if dtype != torch.float32 and not kept:
                masters[name] = parameter.detach().float()
                parameter.data = parameter.data.to(dtype)
        return masters

    def flops(self, shape: Iterable[int], text_tokens: int) -> int:
        """Multiply-adds x 2 of one forward of a latent [B, C, T, H, W]: matrix products and attention only."""
        B, *latent = shape
        grid, S, D, c = self.grid(latent), text_tokens, self.config.width, self.config
        L, patch = math.prod(grid), math.prod(c.patch_size)
        if (sparse := self.sparse(grid)) is None:
            pairs = L * L
        else:  # tiles are multiplied whole; the coarse branch has one token a tile, the gate one more linear
            tiles, topk = sparse
            pairs = tiles.n * topk * tiles.slots**2 + tiles.n**2
        block = (
            L * (5 if sparse else 4) * D * D
            + 2 * pairs * D
            + L * 2 * D * D
            + S * 2 * D * D
            + 2 * L * S * D
            + 2 * L * D * c.ffn_dim
        )
        ends = L * D * patch * (c.in_channels + c.out_channels) + S * (c.text_dim + D) * D
        time = c.freq_dim * D + 7 * D * D
        return 2 * B * (c.num_layers * block + ends + time)
