"""Where batches come from: the built-in world, prompt files, or folders of encoded latents.

A batch is a function of (seed, step, sample): the position of the sampler is the step, and resuming needs nothing else.
B batch, C channel, T frames, H W space.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastdmd import shapes
from fastdmd.denoiser import Batch, Cond
from fastdmd.distances import sliced_wasserstein
from fastdmd.encoded import EncodedWorld, read_folders
from fastdmd.models.family import Family
from fastdmd.prompts import PromptWorld, read_prompts
from fastdmd.rng import Rng

TEMPORAL, SPATIAL, CHANNELS = 4, 8, 16  # the Wan 2.1 VAE: 1 + 4 (T - 1) frames, 8 x 8 pixels, 16 channels
IMAGE_CHANNELS = 4  # the SDXL VAE, 8 x 8 pixels too
Kind = Literal["shapes", "prompts", "encoded"]
KINDS: Mapping[Kind, str] = {"shapes": "'shapes'", "prompts": "prompt files", "encoded": "encoded folders"}


def kind_of(source: str) -> Kind:
    if source == "shapes":
        return "shapes"
    return "encoded" if Path(source).is_dir() else "prompts"


@dataclass(frozen=True, kw_only=True)
class Config:
    sources: tuple[str, ...]  # "shapes"; or text files with a prompt a line; or folders of encoded latents
    frames: int | None = None  # of a video; absent: images
    resolution: tuple[int, int]  # height, width in pixels
    caption_dropout: float = 0.0
    negative_prompt: str = ""  # the other side of guidance

    @property
    def kind(self) -> Kind:
        """Of all sources; `problems` has those that mix kinds."""
        kinds: set[Kind] = {kind_of(source) for source in self.sources}
        return kinds.pop() if len(kinds) == 1 else "prompts"

    def latent_frames(self) -> int:
        """Of an image 1."""
        if self.frames is None:
            return 1
        return self.frames if self.kind == "shapes" else (self.frames - 1) // TEMPORAL + 1

    def frames_for(self, latent_frames: int) -> int:
        """The pixel frames that give a number of latent frames."""
        return latent_frames if self.kind == "shapes" else max(1, (latent_frames - 1) * TEMPORAL + 1)

    def latent_shape(self) -> tuple[int, ...]:
        """(C, T, H, W), of images (C, H, W)."""
        time = () if self.frames is None else (self.latent_frames(),)
        H, W = self.resolution
        if self.kind == "shapes":
            return (3, *time, H, W)
        return (CHANNELS if time else IMAGE_CHANNELS, *time, H // SPATIAL, W // SPATIAL)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from self._source_problems()
        builtin = self.kind == "shapes"
        if builtin and len(self.negative_prompt.split()) > shapes.TEXT_TOKENS:
            yield "negative_prompt", f"{self.negative_prompt!r} is over {shapes.TEXT_TOKENS} words; the usual one is ''"
        if self.kind == "encoded" and self.negative_prompt:
            yield "negative_prompt", "encoded folders have the empty prompt as guidance's other side; remove the key"
        if self.frames is not None:
            yield from self._frame_problems(self.frames)
        grain, least = (shapes.BLOCK, 4 * shapes.BLOCK) if builtin else (2 * SPATIAL, 2 * SPATIAL)
        usual = "[12, 12]" if builtin else "[1024, 1024]" if self.frames is None else "[480, 832]"
        if any(n < least or n % grain for n in self.resolution):
            yield (
                "resolution",
                f"{list(self.resolution)} is not made of multiples of {grain} from {least} on; e.g. {usual}",
            )
        if not 0 <= self.caption_dropout < 1:
            yield "caption_dropout", f"{self.caption_dropout} leaves [0, 1); 0 is off"

    def _source_problems(self) -> Iterator[tuple[str, str]]:
        kinds = sorted({KINDS[kind_of(source)] for source in self.sources})
        absent = [source for source in self.sources if source != "shapes" and not Path(source).exists()]
        if not self.sources:
            yield "sources", "is empty; use ['shapes'], prompt files or encoded folders"
        elif absent:
            names = ", ".join(map(repr, absent))
            yield "sources", f"no file {names}; use 'shapes', files with a prompt a line, or encoded folders"
        elif len(kinds) > 1:
            yield "sources", f"mixes {' and '.join(kinds)}; use one of them"
        else:
            try:
                if self.kind == "prompts":
                    read_prompts(self.sources)
                elif self.kind == "encoded":
                    read_folders(self.sources, self.latent_shape())
            except ValueError as e:
                yield "sources", str(e)

    def _frame_problems(self, frames: int) -> Iterator[tuple[str, str]]:
        if frames < 1:
            yield "frames", f"{frames} is not positive; Wan 2.1 uses 81"
        elif (low := self.frames_for(self.latent_frames())) != frames:
            yield (
                "frames",
                f"{frames} is not 1 + {TEMPORAL} n, as the VAE packs frames; nearest: {low} or {low + TEMPORAL}",
            )
        elif self.kind == "shapes" and frames == 1:
            yield "frames", "1 is a picture, and a video moves; use 2 or more, or remove the key for images"

    def with_size(self, cond: Cond) -> Cond:
        """Of images, with what SDXL is told of size and crop: time_ids float32 [n, 6] in pixels."""
        if self.frames is not None:
            return cond
        H, W = self.resolution
        size = torch.tensor([H, W, 0, 0, H, W], dtype=torch.float32, device=cond.text.device)
        return replace(cond, time_ids=size.expand(len(cond.text), -1))


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
        return self.config.with_size(Cond(text, text.sum(1)))


def make_world(config: Config, family: Family, path: str | None, device: torch.device, dtype: torch.dtype) -> World:
    """`path`: the diffusers folder with text encoder and VAE; the built-in world needs none."""
    if config.kind == "shapes":
        return ImageShapesWorld(config, device) if config.frames is None else ShapesWorld(config, device)
    assert path is not None  # the configuration was checked
    return (EncodedWorld if config.kind == "encoded" else PromptWorld)(config, family, path, device, dtype)
