"""Worlds in the terms of a diffusers folder: prompts go through its text encoder, and latents through its VAE."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdmd.denoiser import Batch, Cond
from fastdmd.models.family import Family
from fastdmd.rng import Rng

if TYPE_CHECKING:
    from fastdmd.data import Config


def read_prompts(sources: Sequence[str]) -> list[str]:
    """The prompts of text files; ValueError without any."""
    prompts: list[str] = []
    for source in sources:
        try:
            lines = Path(source).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as e:
            raise ValueError(f"{source!r} is not UTF-8 at byte {e.start}; save the file as UTF-8") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{list(sources)} hold no prompt; write a prompt a line")
    return prompts


class ModelWorld:
    """A world in the text embeddings and latents of a diffusers folder: it shows samples, and cannot score them."""

    def __init__(
        self,
        config: "Config",
        family: Family,
        path: str,
        device: torch.device,
        dtype: torch.dtype,
        prompts: Sequence[str],
    ) -> None:
        self.config, self.family, self.path, self.device, self.dtype = config, family, path, device, dtype
        self.prompts: Sequence[str] = prompts
        self.latent_shape, self.negative_prompt = config.latent_shape(), config.negative_prompt
        self.encoder = family.encoder(path, device, dtype)

    def cond(self, prompts: Sequence[str]) -> Cond:
        return self.told(self.encoder(list(prompts)))

    def told(self, cond: Cond) -> Cond:
        """What a network is told of embeddings, on the device."""
        return self.config.with_size(cond).to(self.device)

    def pixels(self, x0: Tensor) -> Tensor:
        return self.family.decode(self.path, x0, self.device, self.dtype)

    def scores(self, x0: Tensor, prompts: Sequence[str], seed: int) -> dict[str, float | None]:
        return {"oracle": None, "swd": None}


class PromptWorld(ModelWorld):
    """Prompts from files, all encoded at the start; data-free."""

    def __init__(self, config: "Config", family: Family, path: str, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, family, path, device, dtype, read_prompts(config.sources))
        self.encoded = self.encoder([*self.prompts, config.negative_prompt])  # n + 1, on the host

    def batch(self, rng: Rng) -> Batch:
        index = rng.integers(len(self.prompts))
        dropped = rng.uniform() < self.config.caption_dropout
        uncond = torch.full_like(index, len(self.prompts))
        rows = torch.where(dropped, uncond, index), uncond
        cond, other = (self.told(self.encoded.rows(row)) for row in rows)
        return Batch(cond, other, self.latent_shape)
