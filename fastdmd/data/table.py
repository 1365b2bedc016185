"""The table [data], and the sizes of latents that follow from it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from fastdmd.batch import Cond
from fastdmd.data import shapes
from fastdmd.data.encoded import read_folders
from fastdmd.data.prompts import read_prompts

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
    sources: tuple[str, ...]  # "shapes"; or text files, one prompt per line; or folders of encoded latents
    frames: int | None = None  # of a video; absent: images
    resolution: tuple[int, int]  # height, width in pixels
    caption_dropout: float = 0.0
    negative_prompt: str = ""  # the other side of guidance

    @property
    def kind(self) -> Kind:
        """Return the kind of all sources; `problems` has those that mix kinds."""
        kinds: set[Kind] = {kind_of(source) for source in self.sources}
        return kinds.pop() if len(kinds) == 1 else "prompts"

    def latent_frames(self) -> int:
        """Return the number of latent frames (1 for images)."""
        if self.frames is None:
            return 1
        return self.frames if self.kind == "shapes" else (self.frames - 1) // TEMPORAL + 1

    def frames_for(self, latent_frames: int) -> int:
        """Return the pixel frames that give a number of latent frames."""
        return latent_frames if self.kind == "shapes" else max(1, (latent_frames - 1) * TEMPORAL + 1)

    def latent_shape(self) -> tuple[int, ...]:
        """Return (C, T, H, W), or (C, H, W) for images."""
        time = () if self.frames is None else (self.latent_frames(),)
        H, W = self.resolution
        if self.kind == "shapes":
            return (3, *time, H, W)
        return (CHANNELS if time else IMAGE_CHANNELS, *time, H // SPATIAL, W // SPATIAL)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from self._source_problems()
        builtin = self.kind == "shapes"
        if builtin and len(self.negative_prompt.split()) > shapes.TEXT_TOKENS:
            yield (
                "negative_prompt",
                f"{self.negative_prompt!r} is over {shapes.TEXT_TOKENS} words; the usual one is ''",
            )
        if self.kind == "encoded" and self.negative_prompt:
            yield (
                "negative_prompt",
                "encoded folders have the empty prompt as guidance's other side; remove the key",
            )
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
            nearest = f"{low} or {low + TEMPORAL}"
            yield "frames", f"{frames} is not 1 + {TEMPORAL} n, as the VAE packs frames; nearest: {nearest}"
        elif self.kind == "shapes" and frames == 1:
            yield "frames", "1 is a picture, and a video moves; use 2 or more, or remove the key for images"

    def with_size(self, cond: Cond) -> Cond:
        """Add SDXL's size and crop to the condition of images: time_ids float32 [n, 6] in pixels."""
        if self.frames is not None:
            return cond
        H, W = self.resolution
        size = torch.tensor([H, W, 0, 0, H, W], dtype=torch.float32, device=cond.text.device)
        return replace(cond, time_ids=size.expand(len(cond.text), -1))
