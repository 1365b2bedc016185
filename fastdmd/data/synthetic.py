"""Random batches of the shapes that a run's data has, for what depends on shapes alone.

No encoder is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdmd.batch import Batch, Cond
from fastdmd.data.encoded import read_folders
from fastdmd.data.shapes import TEXT_TOKENS
from fastdmd.data.table import Config
from fastdmd.data.world import Model
from fastdmd.models.family import AnyFamily
from fastdmd.rng import Rng


@dataclass
class SyntheticWorld:
    """A world without files, captions or pictures."""

    config: Config
    family: AnyFamily
    latent_shape: tuple[int, ...]
    one: Cond  # of one sample, on the host
    device: torch.device
    prompts: Sequence[str] = ("",)
    negative_prompt: str = ""

    def cond(self, prompts: Sequence[str]) -> Cond:
        rows = self.one.rows(torch.zeros(len(prompts), dtype=torch.int64))
        return self.family.sized(rows, self.config.resolution).to(self.device)

    def batch(self, rng: Rng) -> Batch:
        samples = [self.negative_prompt] * len(rng.uniform())
        x0 = None if self.config.kind == "prompts" else rng.normal(self.latent_shape).to(self.device)
        return Batch(self.cond(samples), self.cond(samples), self.latent_shape, x0)

    def pixels(self, x0: Tensor) -> Tensor:
        raise AssertionError("nothing shows synthetic samples")

    def scores(self, x0: Tensor, prompts: Sequence[str], seed: int) -> dict[str, float | None]:
        raise AssertionError("nothing scores synthetic samples")


def make_synthetic(
    config: Config, model: Model, architecture: Any, latent_shape: tuple[int, ...]
) -> SyntheticWorld:
    """Return a world of the table [data] whose prompts have an encoder's shapes and dtype."""
    family, dtype = model.family, model.dtype
    if config.kind == "encoded":
        one = read_folders(config.sources, latent_shape)[0].uncond()
    else:
        tokens = TEXT_TOKENS if config.kind == "shapes" else family.text_tokens
        dtype = torch.float32 if config.kind == "shapes" else dtype  # as it embeds its captions
        generator = torch.Generator().manual_seed(0)
        text = torch.randn(1, tokens, architecture.text_dim, generator=generator).to(dtype)
        pooled = None
        if "pooled_dim" in family.conditioning:
            pooled = torch.randn(1, architecture.pooled_dim, generator=generator).to(dtype)
        one = Cond(text, pooled)
    return SyntheticWorld(config, family, latent_shape, one, model.device)
