"""Where batches come from: the built-in world, or prompt files encoded once at the start.

A batch is a function of (seed, step, sample): the position of the sampler is the step, and resuming needs nothing else.
B batch, C channel, T frames, H W space.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastdmd import shapes
from fastdmd.denoiser import Batch, Cond
from fastdmd.distances import sliced_wasserstein
from fastdmd.rng import Rng

TEMPORAL, SPATIAL, CHANNELS = 4, 8, 16  # the Wan 2.1 VAE: 1 + 4 (T - 1) frames, 8 x 8 pixels, 16 channels


@dataclass(frozen=True, kw_only=True)
class Config:
    sources: tuple[str, ...]  # "shapes", or text files with a prompt a line
    frames: int
    resolution: tuple[int, int]  # height, width in pixels
    caption_dropout: float = 0.0
    negative_prompt: str = ""  # the other side of guidance

    @property
    def builtin(self) -> bool:
        return self.sources == ("shapes",)

    def latent_frames(self) -> int:
        return self.frames if self.builtin else (self.frames - 1) // TEMPORAL + 1

    def frames_for(self, latent_frames: int) -> int:
        """The pixel frames that give a number of latent frames."""
        return latent_frames if self.builtin else max(1, (latent_frames - 1) * TEMPORAL + 1)

    def latent_shape(self) -> tuple[int, int, int, int]:
        H, W = self.resolution
        return (3, self.frames, H, W) if self.builtin else (CHANNELS, self.latent_frames(), H // SPATIAL, W // SPATIAL)

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.sources:
            yield "sources", "is empty; use ['shapes'] or prompt files"
        if "shapes" in self.sources and not self.builtin:
            yield "sources", "'shapes' does not mix with files; use one or the other"
        for source in self.sources:
            if source != "shapes" and not Path(source).is_file():
                yield "sources", f"'{source}' is not a file; use 'shapes' or a text file with a prompt a line"
        if self.frames < 1:
            yield "frames", f"{self.frames} is not positive; Wan 2.1 uses 81"
        elif self.frames_for(self.latent_frames()) != self.frames:
            low = self.frames_for(self.latent_frames())
            yield (
                "frames",
                f"{self.frames} is not 1 + {TEMPORAL} n, as the VAE packs frames; nearest: {low} or {low + TEMPORAL}",
            )
        grain = 2 if self.builtin else 2 * SPATIAL
        if any(n < grain or n % grain for n in self.resolution):
            yield "resolution", f"{list(self.resolution)} is not made of multiples of {grain}; Wan 2.1 uses [480, 832]"
        if not 0 <= self.caption_dropout < 1:
            yield "caption_dropout", f"{self.caption_dropout} leaves [0, 1); 0 is off"


class World(Protocol):
    """A source of batches that can also show and score what a student makes of its prompts."""

    latent_shape: tuple[int, ...]
    prompts: Sequence[str]
    negative_prompt: str

    def cond(self, prompts: Sequence[str]) -> Cond: ...

    def batch(self, rng: Rng) -> Batch: ...

    def pixels(self, x0: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] on the host."""
        ...

    def scores(self, x0: Tensor, prompts: Sequence[str], seed: int) -> dict[str, float | None]:
        """{"oracle", "swd"}, None where the world cannot tell."""
        ...


class ShapesWorld:
    """The built-in world: captions, places and speckle drawn for every sample; the latent is the video itself."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device, self.negative_prompt = config, device, config.negative_prompt
        self.latent_shape = config.latent_shape()
        self.prompts = shapes.CAPTIONS
        self.text = shapes.embed([*shapes.CAPTIONS, config.negative_prompt]).to(device)

    def cond(self, prompts: Sequence[str]) -> Cond:
        return Cond(shapes.embed(list(prompts)).to(self.device))

    def batch(self, rng: Rng) -> Batch:
        caption = rng.integers(len(shapes.CAPTIONS))
        x0 = self._render(caption, rng)
        dropped = rng.uniform() < self.config.caption_dropout
        uncond = torch.full_like(caption, len(shapes.CAPTIONS))
        text = self.text[torch.where(dropped, uncond, caption).to(self.device)]
        return Batch(Cond(text), Cond(self.text[uncond.to(self.device)]), self.latent_shape, x0.to(self.device))

    def _render(self, caption: Tensor, rng: Rng) -> Tensor:
        _, T, H, W = self.latent_shape
        place = torch.stack([rng.integers(H), rng.integers(W)], dim=1)
        return shapes.render(caption, place, rng.integers(2, (T, H, W)))

    def pixels(self, x0: Tensor) -> Tensor:
        return shapes.pixels(x0)

    def scores(self, x0: Tensor, prompts: Sequence[str], seed: int) -> dict[str, float | None]:
        """Share of videos with everything right, and sliced Wasserstein to as many real videos of the same captions."""
        caption = torch.tensor([shapes.CAPTIONS.index(prompt) for prompt in prompts])
        real = self._render(caption, Rng(seed, 0, "reference", range(len(prompts)), "cpu"))
        right = shapes.right(shapes.read(x0.cpu()), caption)
        return {"oracle": float(right.double().mean()), "swd": sliced_wasserstein(x0.cpu(), real)}


class PromptWorld:
    """Prompts from files, encoded once with the model's own text encoder; data-free, decoded with its VAE."""

    def __init__(self, config: Config, path: str, device: torch.device, dtype: torch.dtype) -> None:
        from fastdmd.models.frozen import TextEncoder  # diffusers and transformers take seconds to import

        lines = [line.strip() for source in config.sources for line in Path(source).read_text("utf-8").splitlines()]
        self.prompts = [line for line in lines if line]
        if not self.prompts:
            raise ValueError(f"data.sources = {list(config.sources)} hold no prompt; write a prompt a line")
        self.config, self.path, self.device, self.dtype = config, path, device, dtype
        self.latent_shape = config.latent_shape()
        self.negative_prompt = config.negative_prompt
        self.encoder = TextEncoder(path, device, dtype)
        self.text = self.encoder([*self.prompts, config.negative_prompt])  # [n + 1, S, D] on the host

    def cond(self, prompts: Sequence[str]) -> Cond:
        return Cond(self.encoder(list(prompts)).to(self.device))

    def batch(self, rng: Rng) -> Batch:
        index = rng.integers(len(self.prompts))
        dropped = rng.uniform() < self.config.caption_dropout
        uncond = torch.full_like(index, len(self.prompts))
        rows = torch.where(dropped, uncond, index), uncond
        cond, other = (Cond(self.text[row].to(self.device, non_blocking=True)) for row in rows)
        return Batch(cond, other, self.latent_shape)

    def pixels(self, x0: Tensor) -> Tensor:
        from fastdmd.models.frozen import decode

        return decode(self.path, x0, self.device, self.dtype)

    def scores(self, x0: Tensor, prompts: Sequence[str], seed: int) -> dict[str, float | None]:
        return {"oracle": None, "swd": None}


def make_world(config: Config, path: str | None, device: torch.device, dtype: torch.dtype) -> World:
    if config.builtin:
        return ShapesWorld(config, device)
    assert path is not None  # the configuration was checked
    return PromptWorld(config, path, device, dtype)
