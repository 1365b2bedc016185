"""The sizes of latents: how pixels are packed into them, by a family's VAE or by the built-in world."""

from collections.abc import Iterator
from dataclasses import dataclass

Resolution = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """How latents follow from the frames and the resolution of [data]."""

    channels: int
    spatial: int  # pixels along a side of a latent
    temporal: int | None  # frames of a latent frame, but for the first, which has one; None: images
    multiple: int  # what a side in pixels is a multiple of
    least: int  # pixels of a side
    usual_frames: int | None
    usual_resolution: Resolution

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the keys of [data] that the axes of latents behind C follow from."""
        return (
            ("resolution", "resolution") if self.temporal is None else ("frames", "resolution", "resolution")
        )

    def frames(self, pixel_frames: int | None) -> int:
        """Return the number of latent frames (1 for images)."""
        if pixel_frames is None or self.temporal is None:
            return 1
        return (pixel_frames - 1) // self.temporal + 1

    def pixel_frames(self, frames: int) -> int:
        """Return the frames that a number of latent frames stand for."""
        return max(1, (frames - 1) * (self.temporal or 1) + 1)

    def shape(self, pixel_frames: int | None, resolution: Resolution) -> tuple[int, ...]:
        """Return (C, T, H, W), or (C, H, W) for images."""
        time = () if self.temporal is None else (self.frames(pixel_frames),)
        H, W = resolution
        return (self.channels, *time, H // self.spatial, W // self.spatial)

    def problems(self, pixel_frames: int | None, resolution: Resolution) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with sizes, by their keys in [data]."""
        if any(n < self.least or n % self.multiple for n in resolution):
            yield (
                "resolution",
                f"{list(resolution)} is not made of multiples of {self.multiple} from {self.least} on; "
                f"e.g. {list(self.usual_resolution)}",
            )
        if self.temporal is None:
            if pixel_frames is not None:
                yield "frames", "the model makes images; remove the key"
        elif pixel_frames is None:
            yield "frames", f"missing; the model makes videos: write frames = {self.usual_frames}"
        elif pixel_frames < 1:
            yield "frames", f"{pixel_frames} is not positive; e.g. {self.usual_frames}"
        elif (low := self.pixel_frames(self.frames(pixel_frames))) != pixel_frames:
            yield (
                "frames",
                f"{pixel_frames} is not 1 + {self.temporal} n, as the VAE packs frames; "
                f"nearest: {low} or {low + self.temporal}",
            )
