"""What a network is conditioned on, and one micro-batch of it. B batch, S text tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cond:
    """What a network is conditioned on, beside the time."""

    text: Tensor  # [B, S, text_dim]
    pooled: Tensor | None = None  # [B, P], SDXL's second text embedding
    time_ids: Tensor | None = None  # [B, 6], SDXL's sizes and crop
    guidance: Tensor | None = None  # float32 [B], the w of a network with a guidance embedding

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
        """Return the conditions of the samples int64 [n], in that order."""
        return self._each(lambda x: x[index])

    def to(self, device: torch.device | str) -> "Cond":
        return self._each(lambda x: x.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Cond":
        return replace(self, **{name: change(x) for name, x in vars(self).items() if x is not None})


@dataclass(frozen=True)
class Batch:
    """One micro-batch: its condition, that of guidance's other side, and clean latents if there are any."""

    cond: Cond
    uncond: Cond
    latent_shape: tuple[int, ...]  # without B
    x0: Tensor | None = None
