"""One network with its schedule: everyone else sees a denoiser, whatever the network predicts.

B batch; latents are [B, C, ..]; times are float64 [B] on the host.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdmd.schedule import Schedule, coeffs, per_sample, wide
from fastdmd_kernels import guide

__all__ = ["Batch", "Cond", "Denoiser", "guide"]


@dataclass(frozen=True)
class Cond:
    """What a network is conditioned on, beside the time."""

    text: Tensor  # [B, S, text_dim]
    pooled: Tensor | None = None  # [B, P], SDXL's second text embedding
    time_ids: Tensor | None = None  # [B, 6], SDXL's sizes and crop
    guidance: Tensor | None = None  # float32 [B], the w that a network with a guidance embedding is told

    def cat(self, other: "Cond") -> "Cond":
        def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.cat([a, b])

        return Cond(
            torch.cat([self.text, other.text]),
            both(self.pooled, other.pooled),
            both(self.time_ids, other.time_ids),
            both(self.guidance, other.guidance),
        )

    def rows(self, index: Tensor) -> "Cond":
        """Of the samples int64 [n], in that order."""
        return self._each(lambda x: x[index])

    def to(self, device: torch.device | str) -> "Cond":
        return self._each(lambda x: x.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Cond":
        return replace(self, **{name: change(x) for name, x in vars(self).items() if x is not None})


@dataclass(frozen=True)
class Batch:
    """One micro-batch: condition, the condition of guidance's other side, and clean latents where the data has them."""

    cond: Cond
    uncond: Cond
    latent_shape: tuple[int, ...]  # without B
    x0: Tensor | None = None


class Denoiser(nn.Module):
    """(x_t, t, cond) -> x0. `F` is the raw output; the arithmetic around the network is as `wide` as the latents."""

    def __init__(self, net: nn.Module, schedule: Schedule, trainable: Mapping[str, nn.Parameter] | None = None) -> None:
        """`trainable`: the parameters that may learn, by name; absent: all."""
        super().__init__()
        self.net: Any = net  # a models.Net
        self.schedule = schedule
        self.trainable = dict(net.named_parameters()) if trainable is None else trainable
        self.flops = 0  # of all calls so far with their backward, counted on the host; the trainer reads it

    def learn(self, on: bool) -> None:
        """Whether gradients are made for the trainable parameters; the others never get one."""
        self.net.requires_grad_(False)
        for parameter in self.trainable.values():
            parameter.requires_grad_(on)

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """F [B, C, ..] float32 of x_t at times t."""
        return self._call(x_t, coeffs(self.schedule, t, x_t).model_t, cond)

    def raw_pair(self, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond) -> tuple[Tensor, Tensor]:
        """(F_c, F_u): both sides of guidance in one batched call."""
        model_t = coeffs(self.schedule, t, x_t).model_t
        return self._call(torch.cat([x_t, x_t]), model_t.repeat(2), cond.cat(uncond)).chunk(2)  # type: ignore[return-value]

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, layers: Collection[int]) -> tuple[Tensor, list[Tensor]]:
        """F as `raw` gives it, and float32 maps [B, D, ..] of its inside after each of the blocks `layers`."""
        F, maps = self.net.features(x_t, coeffs(self.schedule, t, x_t).model_t, cond, layers)
        self._count(F, self.net.flops(x_t.shape, cond.text.shape[1]))
        return wide(F), maps

    def x0(self, x_t: Tensor, t: Tensor, F: Tensor) -> Tensor:
        """a x_t + b F, float32 [B, C, ..]."""
        c = coeffs(self.schedule, t, x_t)
        return per_sample(c.a, x_t) * x_t + per_sample(c.b, x_t) * F

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x0 [B, C, ..] float32."""
        return self.x0(x_t, t, self.raw(x_t, t, cond))

    def block(self, x_t: Tensor, t: Tensor, cond: Cond, cache: Any, write: bool = False) -> Tensor:
        """x0 of the frames that follow those in a causal network's cache; `write` adds them to it."""
        flops = self.net.flops(x_t.shape, cond.text.shape[1], cache.tokens)  # before the cache grows
        F = wide(self.net.forward_block(x_t, coeffs(self.schedule, t, x_t).model_t, cond, cache, write))
        self._count(F, flops)
        return self.x0(x_t, t, F)

    def raw_blocks(self, x_t: Tensor, t: Tensor, cond: Cond, frames: Sequence[int]) -> Tensor:
        """F of a causal network in one pass: blocks of these numbers of frames, each at its own time, t [B, n]."""
        model_t = coeffs(self.schedule, t.flatten(), x_t).model_t.view(t.shape)
        F = wide(self.net.forward_blocks(x_t, model_t, cond, frames))
        self._count(F, self.net.flops(x_t.shape, cond.text.shape[1]))
        return F

    def _call(self, x_t: Tensor, model_t: Tensor, cond: Cond) -> Tensor:
        F = wide(self.net(x_t, model_t, cond))
        self._count(F, self.net.flops(x_t.shape, cond.text.shape[1]))
        return F

    def _count(self, F: Tensor, flops: int) -> None:
        """A forward that gave F, and the backward that it will have."""
        # a backward costs one forward for the inputs and one for the parameters
        backward = F.requires_grad * (1 + any(p.requires_grad for p in self.net.parameters()))
        self.flops += flops * (1 + backward)
