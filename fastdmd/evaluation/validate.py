"""Fixed prompts and seeds through a sampler: scores and moving pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from fastdmd.data.world import World
from fastdmd.log import Progress
from fastdmd.methods.method import Nets, Sampler
from fastdmd.rng import Rng


@dataclass(frozen=True, kw_only=True)
class Config:
    every: int = 0  # steps between validations of the student, the first before training; 0: only at the end
    prompts: tuple[str, ...] = ()  # absent: the data's own
    samples: int = 4  # videos to sample and score, cycling through the prompts
    batch_size: int = 4
    seed: int = 0
    weights: Literal["ema", "student"] = "ema"  # without [ema] the student is all there is
    teacher_steps: int = 50
    teacher_guidance: float | None = None  # absent: method.guidance
    teacher_reference: bool = True  # sample and score the teacher too, at the end
    show: int = 4  # videos in pictures, of the samples

    def problems(self) -> Iterator[tuple[str, str]]:
        for key in ("samples", "batch_size", "teacher_steps", "show"):
            if getattr(self, key) < 1:
                yield key, f"{getattr(self, key)} is not positive; use 1 or more"
        if self.every < 0:
            yield "every", f"{self.every} is negative; 0 validates only at the end"


def prompts_for(config: Config, world: World) -> list[str]:
    """Return the prompts of all validation samples."""
    return list(islice(cycle(config.prompts or world.prompts), config.samples))


@torch.no_grad()
def generate(
    sampler: Sampler,
    nets: Nets,
    world: World,
    prompts: Sequence[str],
    batch_size: int,
    seed: int,
    device: torch.device,
    what: str,
) -> Tensor:
    """Return latents [n, C, T, H, W] for prompts.

    The noise of sample i depends on (seed, i) only, whatever the batch size.
    """
    done, progress = [], Progress(what, len(prompts))
    for first in range(0, len(prompts), batch_size):
        chunk = prompts[first : first + batch_size]
        rng = Rng(seed, 0, "sample", range(first, first + len(chunk)), device)
        noise = rng.normal(world.latent_shape)
        uncond = world.cond([world.negative_prompt] * len(chunk))
        done.append(sampler.run(nets, noise, world.cond(chunk), uncond, rng))
        progress.show(first + len(chunk))
    return torch.cat(done)


def save_webp(path: Path, pixels: Tensor, scale: int = 1, fps: int = 4) -> None:
    """Write one video uint8 [T, H, W, 3] as an animated WebP."""
    frames = [Image.fromarray(frame.numpy()) for frame in pixels]
    if scale > 1:
        frames = [
            frame.resize((frame.width * scale, frame.height * scale), Image.Resampling.NEAREST)
            for frame in frames
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0, lossless=True)
