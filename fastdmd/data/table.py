"""The table [data]."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdmd.data import shapes
from fastdmd.data.encoded import read_folders
from fastdmd.data.prompts import read_prompts
from fastdmd.latents import LatentSpec

Kind = Literal["shapes", "prompts", "encoded"]
KINDS: Mapping[Kind, str] = {"shapes": "'shapes'", "prompts": "prompt files", "encoded": "encoded folders"}


def kind_of(source: str) -> Kind:
    """Return the kind of a source; one that is elsewhere is a folder if its name has no ending."""
    if source == "shapes":
        return "shapes"
    path = Path(source)
    is_folder = path.is_dir() if path.exists() else not path.suffix
    return "encoded" if is_folder else "prompts"


@dataclass(frozen=True, kw_only=True)
class Config:
    sources: tuple[str, ...]  # "shapes"; or text files, one prompt per line; or folders of encoded latents
    frames: int | None = None  # of a video; images have none
    resolution: tuple[int, int]  # height, width in pixels
    caption_dropout: float = 0.0
    negative_prompt: str = ""  # the other side of guidance

    @property
    def kind(self) -> Kind:
        """Return the kind of all sources; `problems` has those that mix kinds."""
        kinds: set[Kind] = {kind_of(source) for source in self.sources}
        return kinds.pop() if len(kinds) == 1 else "prompts"

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from self._source_problems()
        if self.kind == "shapes" and len(self.negative_prompt.split()) > shapes.TEXT_TOKENS:
            yield (
                "negative_prompt",
                f"{self.negative_prompt!r} is over {shapes.TEXT_TOKENS} words; the usual one is ''",
            )
        if self.kind == "encoded" and self.negative_prompt:
            yield (
                "negative_prompt",
                "encoded folders have the empty prompt as guidance's other side; remove the key",
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
            yield (
                "sources",
                f"no file {names}; use 'shapes', files with one prompt per line, or encoded folders",
            )
        elif len(kinds) > 1:
            yield "sources", f"mixes {' and '.join(kinds)}; use one of them"
        elif self.kind == "prompts":
            try:
                read_prompts(self.sources)
            except ValueError as e:
                yield "sources", str(e)

    def size_problems(self, latents: LatentSpec) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with its sizes, and with encoded folders of others."""
        yield from latents.problems(self.frames, self.resolution)
        if self.kind == "shapes" and self.frames == 1 and latents.temporal is not None:
            yield "frames", "1 is a picture, and a video moves; use 2 or more"
        if self.kind == "encoded" and all(Path(source).is_dir() for source in self.sources):
            try:
                read_folders(self.sources, latents.shape(self.frames, self.resolution))
            except ValueError as e:
                yield "sources", str(e)
