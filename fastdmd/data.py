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
IMAGE_CHANNELS = 4  # the SDXL VAE, 8 x 8 pixels too


@dataclass(frozen=True, kw_only=True)
class Config:
    sources: tuple[str, ...]  # "shapes", or text files with a prompt a line
    frames: int | None = None  # of a video; absent: images
    resolution: tuple[int, int]  # height, width in pixels
    caption_dropout: float = 0.0
    negative_prompt: str = ""  # the other side of guidance

    @property
    def builtin(self) -> bool:
        return self.sources == ("shapes",)

    def latent_frames(self) -> int:
        """Of an image 1."""
        if self.frames is None:
            return 1
        return self.frames if self.builtin else (self.frames - 1) // TEMPORAL + 1

    def frames_for(self, latent_frames: int) -> int:
        """The pixel frames that give a number of latent frames."""
        return latent_frames if self.builtin else max(1, (latent_frames - 1) * TEMPORAL + 1)

    def latent_shape(self) -> tuple[int, ...]:
        """(C, T, H, W), of images (C, H, W)."""
        time = () if self.frames is None else (self.latent_frames(),)
        H, W = self.resolution
        if self.builtin:
            return (3, *time, H, W)
        return (CHANNELS if time else IMAGE_CHANNELS, *time, H // SPATIAL, W // SPATIAL)

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.sources:
            yield "sources", "is empty; use ['shapes'] or prompt files"
        if "shapes" in self.sources and not self.builtin:
            yield "sources", "'shapes' does not mix with files; use one or the other"
        if absent := [source for source in self.sources if source != "shapes" and not Path(source).is_file()]:
            yield "sources", f"no file {', '.join(map(repr, absent))}; use 'shapes', or files with a prompt a line"
        elif "shapes" not in self.sources:
            try:
                read_prompts(self.sources)
            except ValueError as e:
                yield "sources", str(e)
        if self.builtin and len(self.negative_prompt.split()) > shapes.TEXT_TOKENS:
            yield "negative_prompt", f"{self.negative_prompt!r} is over {shapes.TEXT_TOKENS} words; the usual one is ''"
        if self.frames is None:
            if not self.builtin:
                yield "frames", "absent is images, and prompt files make videos only; write frames = 81"
        elif self.frames < 1:
            yield "frames", f"{self.frames} is not positive; Wan 2.1 uses 81"
        elif self.frames_for(self.latent_frames()) != self.frames:
            low = self.frames_for(self.latent_frames())
            yield (
                "frames",
                f"{self.frames} is not 1 + {TEMPORAL} n, as the VAE packs frames; nearest: {low} or {low + TEMPORAL}",
            )
        elif self.builtin and self.frames == 1:
            yield "frames", "1 is a picture, and a video moves; use 2 or more, or remove the key for images"
        grain, least, usual = (
            (shapes.BLOCK, 4 * shapes.BLOCK, "[12, 12]") if self.builtin else (2 * SPATIAL, 2 * SPATIAL, "[480, 832]")
        )
        if any(n < least or n % grain for n in self.resolution):
            yield (
                "resolution",
                f"{list(self.resolution)} is not made of multiples of {grain} from {least} on; e.g. {usual}",
            )
        if not 0 <= self.caption_dropout < 1:
            yield "caption_dropout", f"{self.caption_dropout} leaves [0, 1); 0 is off"


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
        self.captions = shapes.captions(config.latent_frames())
        n = len(self.captions)
        # all of them, in strides: the first few, which are shown, differ in every word
        self.prompts: Sequence[str] = [self.captions[13 * i % n] for i in range(n)]
        self.text = shapes.embed([*self.captions, config.negative_prompt]).to(device)

    def cond(self, prompts: Sequence[str]) -> Cond:
        return self._tell(shapes.embed(list(prompts)).to(self.device))

    def _tell(self, text: Tensor) -> Cond:
        """What a network is told of text embeddings [B, S, D]."""
        return Cond(text)

    def batch(self, rng: Rng) -> Batch:
        caption = rng.integers(len(self.captions))
        x0 = self._render(caption, rng)
        dropped = rng.uniform() < self.config.caption_dropout
        uncond = torch.full_like(caption, len(self.captions))
        rows = torch.where(dropped, uncond, caption), uncond
        cond, other = (self._tell(self.text[row.to(self.device)]) for row in rows)
        return Batch(cond, other, self.latent_shape, x0.to(self.device))

    def _render(self, caption: Tensor, rng: Rng) -> Tensor:
        T, (H, W) = self.config.latent_frames(), self.config.resolution
        place = shapes.BLOCK * torch.stack([rng.integers(n // shapes.BLOCK) for n in (H, W)], dim=1)
        return shapes.render(caption, place, rng.integers(2, (T, H, W))).view(-1, *self.latent_shape)

    def pixels(self, x0: Tensor) -> Tensor:
        return shapes.pixels(x0)

    def scores(self, x0: Tensor, prompts: Sequence[str], seed: int) -> dict[str, float | None]:
        """Share of samples with everything right, and sliced Wasserstein to as many real ones of the same captions."""
        caption = torch.tensor([self.captions.index(prompt) for prompt in prompts])
        real = self._render(caption, Rng(seed, 0, "reference", range(len(prompts)), "cpu"))
        right = shapes.right(shapes.read(x0.cpu()), caption)
        swd = sliced_wasserstein(shapes.as_video(x0.cpu()), shapes.as_video(real))
        return {"oracle": float(right.double().mean()), "swd": swd}


class ImageShapesWorld(ShapesWorld):
    """The built-in world as images [C, H, W], with all that SDXL wants to be told.

    Pooled text is the sum of a caption's word vectors, so that "" has zeros in both embeddings, as SDXL's uncond has.
    """

    def _tell(self, text: Tensor) -> Cond:
        H, W = self.config.resolution
        size = torch.tensor([H, W, 0, 0, H, W], dtype=torch.float32, device=self.device)
        return Cond(text, text.sum(1), size.expand(len(text), -1))


class PromptWorld:
    """Prompts from files, encoded once with the model's own text encoder; data-free, decoded with its VAE."""

    def __init__(self, config: Config, path: str, device: torch.device, dtype: torch.dtype) -> None:
        from fastdmd.models.frozen import TextEncoder  # diffusers and transformers take seconds to import

        self.prompts: Sequence[str] = read_prompts(config.sources)
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
        return ImageShapesWorld(config, device) if config.frames is None else ShapesWorld(config, device)
    assert path is not None  # the configuration was checked
    return PromptWorld(config, path, device, dtype)
