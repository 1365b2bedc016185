"""Worlds: sources of batches that can also show and score what a student makes of their prompts.

A batch is a function of (seed, step, sample): the position of the sampler is the step, and resuming needs
nothing else. B batch, C channel, T frames, H W space.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastdmd.batch import Batch, Cond
from fastdmd.data import shapes
from fastdmd.data.distances import sliced_wasserstein
from fastdmd.data.encoded import read_folders, read_sample
from fastdmd.data.prompts import read_prompts
from fastdmd.data.table import Config
from fastdmd.models.family import AnyFamily
from fastdmd.rng import Rng


class World(Protocol):
    """A source of batches that can also show and score what a student makes of its prompts."""

    latent_shape: tuple[int, ...]
    prompts: Sequence[str]
    negative_prompt: str

    def cond(self, prompts: Sequence[str]) -> Cond: ...

    def batch(self, rng: Rng) -> Batch: ...

    def pixels(self, x0: Tensor) -> Tensor:
        """Return uint8 [B, T, H, W, 3] on the host."""
        ...

    def scores(self, x0: Tensor, prompts: Sequence[str], seed: int) -> dict[str, float | None]:
        """Return {"oracle", "swd"}, None where the world cannot score."""
        ...


class ShapesWorld:
    """The built-in world: captions, places and speckle are drawn; the latent is the video itself."""

    def __init__(
        self, config: Config, family: AnyFamily, latent_shape: tuple[int, ...], device: torch.device
    ) -> None:
        self.config = config
        self.family = family
        self.device = device
        self.latent_shape, self.negative_prompt = latent_shape, config.negative_prompt
        # T H W, T = 1 for images
        self.size = latent_shape[1:] if len(latent_shape) == 4 else (1, *latent_shape[1:])
        self.captions = shapes.captions(self.size[0])
        n = len(self.captions)
        # all of them, in strides: the first few, which are shown, differ in every word
        self.prompts: Sequence[str] = [self.captions[13 * i % n] for i in range(n)]
        self.text = shapes.embed([*self.captions, config.negative_prompt]).to(device)

    def cond(self, prompts: Sequence[str]) -> Cond:
        return self._condition(shapes.embed(list(prompts)).to(self.device))

    def _condition(self, text: Tensor) -> Cond:
        """Return the condition of text embeddings [B, S, D].

        Pooled text is the sum of a caption's word vectors, so that "" has zeros in both embeddings, as SDXL's
        uncond has.
        """
        pooled = text.sum(1) if "pooled_dim" in self.family.conditioning else None
        return self.family.sized(Cond(text, pooled), self.config.resolution)

    def batch(self, rng: Rng) -> Batch:
        caption = rng.integers(len(self.captions))
        x0 = self._render(caption, rng)
        dropped = rng.uniform() < self.config.caption_dropout
        uncond = torch.full_like(caption, len(self.captions))
        rows = torch.where(dropped, uncond, caption), uncond
        cond, other = (self._condition(self.text[row.to(self.device)]) for row in rows)
        return Batch(cond, other, self.latent_shape, x0.to(self.device))

    def _render(self, caption: Tensor, rng: Rng) -> Tensor:
        T, H, W = self.size
        place = shapes.BLOCK * torch.stack([rng.integers(n // shapes.BLOCK) for n in (H, W)], dim=1)
        return shapes.render(caption, place, rng.integers(2, (T, H, W))).view(-1, *self.latent_shape)

    def pixels(self, x0: Tensor) -> Tensor:
        return shapes.pixels(x0)

    def scores(self, x0: Tensor, prompts: Sequence[str], seed: int) -> dict[str, float | None]:
        """Return the share of samples with everything right, and their sliced Wasserstein distance.

        The distance is to as many real samples of the same captions.
        """
        caption = torch.tensor([self.captions.index(prompt) for prompt in prompts])
        real = self._render(caption, Rng(seed, 0, "reference", range(len(prompts)), "cpu"))
        right = shapes.right(shapes.read(x0.cpu()), caption)
        swd = sliced_wasserstein(shapes.as_video(x0.cpu()), shapes.as_video(real))
        return {"oracle": float(right.double().mean()), "swd": swd}


class Model(NamedTuple):
    """The frozen parts of a diffusers folder, and where they compute; the built-in world needs no folder."""

    family: AnyFamily
    path: str | None
    device: torch.device
    dtype: torch.dtype
    codes: torch.dtype | None = None  # of the text encoder's weights, where those are one byte each


class ModelWorld:
    """A world in the text embeddings and latents of a diffusers folder; it cannot score samples."""

    def __init__(
        self,
        config: Config,
        model: Model,
        latent_shape: tuple[int, ...],
        prompts: Sequence[str],
    ) -> None:
        self.config = config
        self.model = model
        self.device = model.device
        self.prompts: Sequence[str] = prompts
        self.latent_shape, self.negative_prompt = latent_shape, config.negative_prompt
        assert model.path is not None  # the configuration was checked
        self.folder = model.path
        self.encoder = model.family.encoder(model.path, model.device, model.dtype, model.codes)

    def cond(self, prompts: Sequence[str]) -> Cond:
        return self.conditioned(self.encoder(list(prompts)))

    def conditioned(self, cond: Cond) -> Cond:
        """Return the condition of embeddings on the device, with all that the family adds."""
        return self.model.family.sized(cond, self.config.resolution).to(self.device)

    def pixels(self, x0: Tensor) -> Tensor:
        return self.model.family.decode(self.folder, x0, self.device, self.model.dtype)

    def scores(self, x0: Tensor, prompts: Sequence[str], seed: int) -> dict[str, float | None]:
        return {"oracle": None, "swd": None}


class PromptWorld(ModelWorld):
    """Prompts from files, all encoded at the start; data-free."""

    def __init__(self, config: Config, model: Model, latent_shape: tuple[int, ...]) -> None:
        super().__init__(config, model, latent_shape, read_prompts(config.sources))
        self.encoded = self.encoder([*self.prompts, config.negative_prompt])  # n + 1, on the host

    def batch(self, rng: Rng) -> Batch:
        index = rng.integers(len(self.prompts))
        dropped = rng.uniform() < self.config.caption_dropout
        uncond = torch.full_like(index, len(self.prompts))
        rows = torch.where(dropped, uncond, index), uncond
        cond, other = (self.conditioned(self.encoded.rows(row)) for row in rows)
        return Batch(cond, other, self.latent_shape)


class EncodedWorld(ModelWorld):
    """Batches with latents. What is shown is encoded and decoded by the model's own text encoder and VAE."""

    def __init__(self, config: Config, model: Model, latent_shape: tuple[int, ...]) -> None:
        folders = read_folders(config.sources, latent_shape)
        super().__init__(config, model, latent_shape, [p for folder in folders for p in folder.prompts])
        self.shards = [shard for folder in folders for shard in folder.shards]
        self.samples = sum(n for _, n in self.shards)
        self.keys, self.uncond = list(folders[0].shapes), folders[0].uncond()

    def batch(self, rng: Rng) -> Batch:
        index = rng.integers(self.samples)
        dropped = rng.uniform() < self.config.caption_dropout
        read = [self.sample(i) for i in index.tolist()]
        x0 = torch.cat([tensors.pop("x0") for tensors in read]).to(self.device).float()
        conds = [
            self.uncond if drop else Cond(**tensors) for tensors, drop in zip(read, dropped, strict=True)
        ]
        uncond = self.uncond.rows(torch.zeros_like(index))
        return Batch(
            self.conditioned(reduce(Cond.cat, conds)), self.conditioned(uncond), self.latent_shape, x0
        )

    def sample(self, index: int) -> dict[str, Tensor]:
        """Read one of all folders' samples: x0, text and, for SDXL, pooled, [1, ..] on the host."""
        for shard, n in self.shards:
            if index < n:
                return read_sample(shard, index, self.keys)
            index -= n
        raise AssertionError("there are `samples` of them")


def make_world(config: Config, model: Model, latent_shape: tuple[int, ...]) -> World:
    """Return the world of the table [data]."""
    if config.kind == "shapes":
        return ShapesWorld(config, model.family, latent_shape, model.device)
    world = EncodedWorld if config.kind == "encoded" else PromptWorld
    return world(config, model, latent_shape)
