"""One network with its schedule: everyone else sees a denoiser, whatever the network predicts.

B batch; latents are [B, C, ..].
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdmd.batch import Cond
from fastdmd.models.attention import Attention
from fastdmd.models.net import Call, Net
from fastdmd.schedule import Coeffs, Schedule, per_sample, wide
from fastdmd_kernels import guide


class Denoiser:
    """(x_t, c, cond) -> x0, c the coefficients of the times of x_t.

    `F` is the raw output; the arithmetic around the network is as `wide` as the latents.
    """

    def __init__(
        self,
        net: Net,
        schedule: Schedule,
        trainable: Mapping[str, nn.Parameter] | None = None,
        role: str | None = None,
        dense: bool = False,
        two_calls: bool = False,
    ) -> None:
        """Take a network for a role.

        Args: trainable, the parameters that may learn, by name (absent: all); role, whose adapters and copies
        its calls take; dense, whether it attends to all on a network that has sparse attention; two_calls,
        whether the sides of guidance are two calls and not one of both.
        """
        self.net, self.schedule = net, schedule
        self.role, self.dense = role, dense
        self.two_calls = two_calls
        self.trainable = dict(net.named_parameters()) if trainable is None else trainable
        self.sparsity = 0.0  # of the step's sparse attention
        # the tiles that it keeps of latents [C, ..]. Here and not in the network, where a number that changes
        # recompiles it at each value; and whole numbers, as a compiler takes those for variables
        self.topk: dict[tuple[int, ...], int | None] = {}

    def keep(self, sparsity: float, shape: Sequence[int]) -> None:
        """Set the sparsity of the steps to come, which are on latents [C, ..] of that shape."""
        self.sparsity = sparsity
        self.topk = {tuple(shape): self.net.topk(shape, sparsity)}

    def learn(self, on: bool) -> None:
        """Say whether gradients are made for the trainable parameters."""
        for parameter in self.trainable.values():
            parameter.requires_grad_(on)

    def raw(self, x_t: Tensor, c: Coeffs, cond: Cond) -> Tensor:
        """Return F [B, C, ..] float32."""
        return self.features(x_t, c.model_t, cond, ())[0]

    def raw_pair(self, x_t: Tensor, c: Coeffs, cond: Cond, uncond: Cond) -> tuple[Tensor, Tensor]:
        """Return (F_c, F_u), both sides of guidance."""
        if self.two_calls:
            return self.raw(x_t, c, cond), self.raw(x_t, c, uncond)
        F, _ = self.features(torch.cat([x_t, x_t]), c.model_t.repeat(2), cond.cat(uncond), ())
        F_c, F_u = F.chunk(2)
        return F_c, F_u

    def guided(self, x_t: Tensor, c: Coeffs, cond: Cond, uncond: Cond, w: float | Tensor) -> Tensor:
        """Return F under guidance w, a number or [B]; without the other side where w is the number 1."""
        if isinstance(w, Tensor):
            w = per_sample(w, x_t)
        elif w == 1:
            return self.raw(x_t, c, cond)
        F_c, F_u = self.raw_pair(x_t, c, cond, uncond)
        return guide(F_u, F_c, w)

    def features(
        self, x_t: Tensor, model_t: Tensor, cond: Cond, layers: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return F, and float32 maps [B, D, ..] of the network's inside after each of the blocks `layers`."""
        return self._call(x_t, model_t, cond, Call(layers=tuple(layers)))

    def x0(self, x_t: Tensor, c: Coeffs, F: Tensor) -> Tensor:
        """Return a x_t + b F, float32 [B, C, ..]."""
        return per_sample(c.a, x_t) * x_t + per_sample(c.b, x_t) * F

    def __call__(self, x_t: Tensor, c: Coeffs, cond: Cond) -> Tensor:
        """Return x0 [B, C, ..] float32."""
        return self.x0(x_t, c, self.raw(x_t, c, cond))

    def block(self, x_t: Tensor, c: Coeffs, cond: Cond, cache: Any, write: bool = False) -> Tensor:
        """Return x0 of the frames that follow those in a causal network's cache; `write` adds them to it."""
        F, _ = self._call(x_t, c.model_t, cond, Call(cache=cache, write=write))
        return self.x0(x_t, c, F)

    def raw_blocks(self, x_t: Tensor, model_t: Tensor, cond: Cond, frames: Sequence[int]) -> Tensor:
        """Return F of a causal network in one pass.

        Block i has frames[i] frames, at its own model_t[:, i] of [B, n].
        """
        return self._call(x_t, model_t, cond, Call(blocks=tuple(frames)))[0]

    def _call(self, x_t: Tensor, model_t: Tensor, cond: Cond, call: Call) -> tuple[Tensor, list[Tensor]]:
        attention = None if self.dense else self._attention(tuple(x_t.shape[1:]))
        out = self.net(x_t, model_t, cond, replace(call, attention=attention, role=self.role))
        return wide(out.F), out.maps

    def _attention(self, shape: tuple[int, ...]) -> Attention | None:
        """Return how self-attention works on latents [C, ..]; None where it is dense."""
        topk = self.topk[shape] if shape in self.topk else self.net.topk(shape, self.sparsity)
        return self.net.attention(shape, topk)
