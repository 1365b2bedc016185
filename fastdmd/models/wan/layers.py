"""Architecture and layers of Wan, named as diffusers names them.

B batch, L tokens, D width, N heads, K head dim, S text tokens. M is 1 where one time holds for all tokens of
a sample, L where each token has its own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fastdmd.models.attention import Attention as SelfAttention
from fastdmd.models.attention import Dense, Sparse
from fastdmd.models.lora import base_of, linear
from fastdmd.models.norm import LayerNorm, RMSNorm
from fastdmd.models.recompute import keep_self_attention, recompute
from fastdmd.schedule import wide
from fastdmd_kernels import norm
from fastdmd_kernels.tiles import Grid, Tiles

DENSE = Dense()


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """The keys of diffusers' `transformer/config.json` that define a text-to-video Wan 2.1."""

    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    ffn_dim: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch_size: Grid = (1, 2, 2)
    cross_attn_norm: bool = True
    eps: float = 1e-6

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def grain(self) -> Grid:
        """Return what latents along T, H, W have to be multiples of."""
        return self.patch_size

    def shallow(self, depth: int) -> Self:
        """Return the architecture with at most `depth` blocks."""
        return replace(self, num_layers=min(depth, self.num_layers))

    def problems(self) -> Iterator[tuple[str, str]]:
        for name, value in vars(self).items():
            numbers: tuple[Any, ...] = (
                cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,)
            )
            least = min(numbers)
            if least <= 0 and value is not False:
                shown = list(numbers) if isinstance(value, tuple) else value
                yield name, f"{shown} is not positive; use 1 or more"
            elif name in ("attention_head_dim", "freq_dim") and least % 2:
                yield name, f"{least} is odd; use {least + 1}, as channels turn in pairs"


def layer_norm(x: Tensor, eps: float) -> Tensor:
    return norm.layer_norm(x.float(), eps)


def rope_table(grid: Grid, K: int, tiles: Tiles | None, device: torch.device) -> Tensor:
    """Return rotations of 3-D RoPE, float32 [2, L, 1, K] (cos, sin with `rotate`'s sign), in token order.

    Head channels are split t, h, w as K - 2 * 2(K//6), 2(K//6), 2(K//6); base 10,000. Angles are computed in
    float64 on the host: at position 1,000 float32 angles are off by 3e-5.
    """
    side = 2 * (K // 6)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [
        axis.flatten()[:, None] * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for axis, dim in zip(axes, (K - 2 * side, side, side), strict=True)
    ]
    angle = torch.cat(angles, dim=1)
    if tiles:
        angle = tiles.to_tile_order(angle, 0)
    cos, sin = angle.cos(), angle.sin()
    pairs = torch.stack([torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)])
    return pairs.flatten(-2)[:, :, None].float().to(device)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate interleaved channel pairs of x [B, L, N, K] by rope [2, L, 1, K].

    The arithmetic is as `wide` as x allows, the result has x's dtype.
    (re, im) -> (re, im) cos + (im, re) (-sin, sin): products of whole rows, 2.8 times faster on a CPU than of
    every other channel.
    """
    cos, sin = rope
    y = wide(x)
    re, im = y.view(*y.shape[:-1], -1, 2).unbind(-1)
    return torch.addcmul(y * cos, torch.stack([im, re], dim=-1).flatten(-2), sin).to(x.dtype)


def time_frequencies(model_t: Tensor, dim: int) -> Tensor:
    """Return the sinusoidal embedding of times [B], float32 [B, dim], cosines first."""
    half = dim // 2
    freq = torch.exp(
        torch.arange(half, device=model_t.device, dtype=torch.float32) * (-math.log(10000.0) / half)
    )
    angle = model_t.float()[:, None] * freq
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TwoLinear(nn.Module):
    """Linear, activation, linear: the time and text embedders, named as diffusers names them."""

    def __init__(self, d_in: int, d_out: int, act: nn.Module) -> None:
        super().__init__()
        self.linear_1, self.act, self.linear_2 = nn.Linear(d_in, d_out), act, nn.Linear(d_out, d_out)

    def forward(self, x: Tensor, role: str | None = None) -> Tensor:
        return linear(self.linear_2, self.act(linear(self.linear_1, x, role)), role)


class ConditionEmbedder(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        D = config.width
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLinear(config.freq_dim, D, nn.SiLU())
        self.time_proj = nn.Linear(D, 6 * D)
        self.text_embedder = TwoLinear(config.text_dim, D, nn.GELU(approximate="tanh"))

    def forward(
        self, model_t: Tensor, text: Tensor, role: str | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return time [B, D], block modulation [B, 6, D] and text [B, S, D]."""
        dtype = base_of(self.time_embedder.linear_1).weight.dtype
        time = self.time_embedder(time_frequencies(model_t, self.freq_dim).to(dtype), role).to(text.dtype)
        modulation = linear(self.time_proj, nnf.silu(time), role).unflatten(1, (6, -1))
        return time, modulation, self.text_embedder(text, role)


class Attention(nn.Module):
    def __init__(self, config: WanConfig, gated: bool = False) -> None:
        super().__init__()
        D = config.width
        self.N = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.to_out = nn.ModuleList([nn.Linear(D, D)])
        # over the whole width, not per head
        self.norm_q, self.norm_k = RMSNorm(D, eps=config.eps), RMSNorm(D, eps=config.eps)
        if gated:  # of the coarse branch; zero, so that at sparsity 0 it is dense attention
            self.to_gate_compress = nn.Linear(D, D)
            nn.init.zeros_(self.to_gate_compress.weight)
            nn.init.zeros_(self.to_gate_compress.bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        rope: Tensor | None = None,
        attention: SelfAttention = DENSE,
        role: str | None = None,
    ) -> Tensor:
        heads = (self.N, -1)
        q = self.norm_q(linear(self.to_q, x, role)).unflatten(-1, heads)  # [B, L, N, K]
        k = self.norm_k(linear(self.to_k, context, role)).unflatten(-1, heads)
        v = linear(self.to_v, context, role).unflatten(-1, heads)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        gate = None
        if isinstance(attention, Sparse):
            gate = linear(self.to_gate_compress, x, role).unflatten(-1, heads)
        return linear(self.to_out[0], attention(q, k, v, gate).flatten(2), role)


class GELUProjection(nn.Module):
    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_in, d_out)

    def forward(self, x: Tensor, role: str | None = None) -> Tensor:
        return nnf.gelu(linear(self.proj, x, role), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        # index 1 is diffusers' dropout: kept so that the names are `net.0.proj` and `net.2`
        D, hidden = config.width, config.ffn_dim
        self.net = nn.Sequential(GELUProjection(D, hidden), nn.Identity(), nn.Linear(hidden, D))
        self.chunks = 1  # of tokens, each computed anew in the backward where there are several

    def forward(self, x: Tensor, role: str | None = None) -> Tensor:
        if self.chunks == 1:
            return self.whole(x, role)
        parts = x.chunk(self.chunks, dim=1)
        if torch.is_grad_enabled():
            done = [recompute(self.whole, part, role) for part in parts]
        else:
            done = [self.whole(part, role) for part in parts]
        return torch.cat(done, dim=1)

    def whole(self, x: Tensor, role: str | None) -> Tensor:
        return linear(self.net[2], self.net[0](x, role), role)


class Block(nn.Module):
    def __init__(self, config: WanConfig, gated: bool) -> None:
        super().__init__()
        D = config.width
        self.eps = config.eps
        self.attn1 = Attention(config, gated)
        self.attn2 = Attention(config)
        self.ffn = FeedForward(config)
        self.norm2 = LayerNorm(D, eps=config.eps) if config.cross_attn_norm else nn.Identity()
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, D) / D**0.5)
        self.selective = False  # whether the backward finds self-attention kept, and all else computed anew

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        """Return `tokens_after`. Selective checkpointing is in here, where a compiler can see it."""
        if self.selective and torch.is_grad_enabled():
            return recompute(self.tokens_after, x, *arguments, contexts=keep_self_attention)
        return self.tokens_after(x, *arguments)

    def tokens_after(
        self,
        x: Tensor,
        text: Tensor,
        modulation: Tensor,
        rope: Tensor,
        attention: SelfAttention,
        role: str | None = None,
    ) -> Tensor:
        """Return the tokens after the block.

        x [B, L, D], text [B, S, D], modulation [B, 6, M, D]. Normalisation, modulation and residuals are in
        float32.
        """
        dtype = x.dtype
        table = self.scale_shift_table[:, :, None]
        shift1, scale1, gate1, shift3, scale3, gate3 = (table + modulation.float()).unbind(1)  # [B, M, D]
        h = (layer_norm(x, self.eps) * (1 + scale1) + shift1).to(dtype)
        x = (x.float() + self.attn1(h, h, rope, attention, role) * gate1).to(dtype)
        x = x + self.attn2(self.norm2(x.float()).to(dtype), text, role=role)
        h = (layer_norm(x, self.eps) * (1 + scale3) + shift3).to(dtype)
        return (x.float() + self.ffn(h, role).float() * gate3).to(dtype)
