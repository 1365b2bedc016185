"""Block-causal Wan and its self-forcing rollout written down in float64 without a cache.

Every call computes the clean frames before a block again, beside it.
B batch, C channel, T frames, H W space, L tokens, D width, N heads, K head dim.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fastdmd.models.wan.layers import WanConfig
from fastdmd.models.wan.net import Wan
from fastdmd.rng import Rng

CONFIG = WanConfig(
    num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=24, in_channels=3, out_channels=3,
    text_dim=8,
    freq_dim=16,
)  # fmt: skip


def linear(p: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG.eps).sqrt() * weight


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + CONFIG.eps).sqrt()


def turned(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """x [B, L, N, K] by RoPE, as complex numbers: each channel pair turns by its place along t, h or w."""
    K = x.shape[-1]
    side = 2 * (K // 6)
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))
    angle = torch.cat(
        [
            places[:, axis, None] * 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) * 2 / dim)
            for axis, dim in enumerate((K - 2 * side, side, side))
        ],
        dim=1,
    )
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)


def velocity(net: Wan, x: Tensor, t: Tensor, text: Tensor, blocks: Sequence[int], held: int = 0) -> Tensor:
    """Return v [B, C, T, H, W] of x at times t [B, T].

    Frame i is of block blocks[i], which sees itself and those before. No gradient flows into the keys and
    values of the first `held` frames.
    """
    p, D, heads = dict(net.named_parameters()), CONFIG.width, (CONFIG.num_attention_heads, -1)
    h = nnf.conv3d(x, p["patch_embedding.weight"], p["patch_embedding.bias"], stride=CONFIG.patch_size)
    grid, size = tuple(h.shape[2:]), h.shape[3] * h.shape[4]  # size: tokens of a frame
    h = h.flatten(2).transpose(1, 2)
    half = CONFIG.freq_dim // 2
    # the network's frequencies are float32, and at time 1000 that shows
    freq = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / half)).double()
    angle = 1000 * t[..., None] * freq
    ce = "condition_embedder"
    time = linear(p, f"{ce}.time_embedder.linear_1", torch.cat([angle.cos(), angle.sin()], -1))
    time = linear(p, f"{ce}.time_embedder.linear_2", nnf.silu(time))
    modulation = linear(p, f"{ce}.time_proj", nnf.silu(time)).unflatten(-1, (6, D))
    time, modulation = (m.repeat_interleave(size, 1) for m in (time, modulation))
    text = linear(p, f"{ce}.text_embedder.linear_1", text)
    text = linear(p, f"{ce}.text_embedder.linear_2", nnf.gelu(text, approximate="tanh"))
    block = torch.tensor(blocks).repeat_interleave(size)
    hidden = block[:, None] < block[None, :]

    def attend(at: str, x: Tensor, context: Tensor, own: bool) -> Tensor:
        q = rms(linear(p, f"{at}.to_q", x), p[f"{at}.norm_q.weight"]).unflatten(-1, heads)
        k = rms(linear(p, f"{at}.to_k", context), p[f"{at}.norm_k.weight"]).unflatten(-1, heads)
        v = linear(p, f"{at}.to_v", context).unflatten(-1, heads)
        if own:
            q, k = turned(q, grid), turned(k, grid)
            k, v = (torch.cat([y[:, : held * size].detach(), y[:, held * size :]], 1) for y in (k, v))
        scores = torch.einsum("blnk,bmnk->bnlm", q, k) / CONFIG.attention_head_dim**0.5
        if own:
            scores = scores.masked_fill(hidden, -math.inf)
        return linear(p, f"{at}.to_out.0", torch.einsum("bnlm,bmnk->blnk", scores.softmax(-1), v).flatten(2))

    for i in range(CONFIG.num_layers):
        at = f"blocks.{i}"
        shift1, scale1, gate1, shift3, scale3, gate3 = (
            p[f"{at}.scale_shift_table"][:, None] + modulation
        ).unbind(2)
        y = norm(h) * (1 + scale1) + shift1
        h = h + attend(f"{at}.attn1", y, y, own=True) * gate1
        y = norm(h) * p[f"{at}.norm2.weight"] + p[f"{at}.norm2.bias"]
        h = h + attend(f"{at}.attn2", y, text, own=False)
        y = linear(p, f"{at}.ffn.net.0.proj", norm(h) * (1 + scale3) + shift3)
        h = h + linear(p, f"{at}.ffn.net.2", nnf.gelu(y, approximate="tanh")) * gate3
    shift, scale = (p["scale_shift_table"][:, None] + time[:, :, None]).unbind(2)
    out = linear(p, "proj_out", norm(h) * (1 + scale) + shift)
    out = out.unflatten(1, grid).unflatten(-1, (*CONFIG.patch_size, -1))  # B t h w pt ph pw C
    return out.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x.shape)


def rollout(
    net: Wan,
    text: Tensor,
    shape: tuple[int, ...],
    times: Sequence[float],
    rng: Rng,
    draw_exits: Callable[[Rng, int], Sequence[int]],
    lengths: Sequence[int],
    context_noise: float = 0.0,
    grad_frames: int | None = None,
    leak: bool = False,
) -> Tensor:
    """Return x0_g [B, C, T, H, W] of blocks of `lengths` frames.

    leak: the famous fault, gradient into what is held.
    """
    exits, noise = draw_exits(rng, len(lengths)), rng.normal(shape).double()
    context, made, start = noise[:, :, :0], [], 0
    for i, (length, e) in enumerate(zip(lengths, exits, strict=True)):
        numbers = [j for j, n in enumerate(lengths[: i + 1]) for _ in range(n)]

        def x0_of(x: Tensor, t: float, context=context, numbers=numbers, start=start) -> Tensor:
            times = torch.tensor([context_noise] * start + [t] * x.shape[2], dtype=torch.float64)
            frames = torch.cat([context, x], 2)
            v = velocity(net, frames, times.expand(len(x), -1), text, numbers, held=0 if leak else start)
            return x - t * v[:, :, start:]

        def fresh(length=length) -> Tensor:
            return rng.normal((shape[0], length, *shape[2:])).double()

        x = noise[:, :, start : start + length]
        for t, t_next in pairwise(times[: e + 1]):
            x = (1 - t_next) * x0_of(x, t).detach() + t_next * fresh()
        x0 = x0_of(x, times[e])
        start += length
        if grad_frames is not None and start <= shape[1] - grad_frames:
            x0 = x0.detach()
        made.append(x0)
        if i < len(lengths) - 1:
            seen = x0 if leak else x0.detach()
            context = torch.cat([context, (1 - context_noise) * seen + context_noise * fresh()], 2)
    return torch.cat(made, 2)
