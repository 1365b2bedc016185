"""The built-in world as images: its oracle, its posterior mean on SDXL's noise, and what it tells a network.

B batch, C channel, H W space.
"""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdmd.batch import Cond
from fastdmd.data import shapes
from fastdmd.data.shapes import COLOURS, IMAGE_CAPTIONS, SHAPES, SPECKLE
from fastdmd.data.table import Config
from fastdmd.data.world import Model, ShapesWorld, make_world
from fastdmd.models.families import FAMILIES
from fastdmd.models.sdxl.folder import Noise
from fastdmd.rng import Rng
from fastdmd.sampler import ode
from fastdmd.schedule import add_noise, coeffs

H, W = SIZE = 12, 12
CPU = torch.device("cpu")
CONFIG = Config(sources=("shapes",), resolution=SIZE)


def images(**values: Any) -> ShapesWorld:
    config = replace(CONFIG, **values)
    shape = shapes.latents(False).shape(None, config.resolution)
    world = make_world(config, Model(FAMILIES["sdxl"], None, CPU, torch.float32), shape)
    assert isinstance(world, ShapesWorld)
    return world


WORLD = images()
VP = Noise().schedule()
KINDS = [(shape, colour) for shape in SHAPES for colour in COLOURS]


@cache
def real(count: int = 96, seed: int = 0, size: tuple[int, int] = SIZE) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] of the world and their captions [B]."""
    batch = images(resolution=size).batch(Rng(seed, 0, "data", range(count), "cpu"))
    assert batch.x0 is not None
    return batch.x0, shapes.caption_index(batch.cond.text, 1)


def fair_bits(seed: int, count: int) -> Tensor:
    return torch.randint(2, (count, 1, H, W), generator=torch.Generator().manual_seed(seed))


def draw(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Images with given speckle bits, all captions in turn, at place (0, 0)."""
    caption = torch.arange(len(bits)) % len(IMAGE_CAPTIONS)
    return shapes.render(caption, torch.zeros(len(bits), 2, dtype=torch.int64), bits)[:, :, 0], caption


def mask_of(caption: Tensor) -> Tensor:
    """Where the shape at place (0, 0) is, [B, 1, H, W]."""
    return shapes.templates(1, H, W)[caption]


def share_right(image: Tensor, caption: Tensor) -> float:
    return shapes.right(shapes.read(image), caption).double().mean().item()


# --------------------------------------------------------------------------------- the world


def test_a_family_of_images_has_them_and_what_it_is_conditioned_on():
    assert WORLD.latent_shape == (3, H, W)
    shape = shapes.latents(True).shape(4, SIZE)
    config = Config(sources=("shapes",), resolution=SIZE, frames=4)
    videos = make_world(config, Model(FAMILIES["wan2.1"], None, CPU, torch.float32), shape)
    assert videos.latent_shape == shape == (3, 4, H, W)
    assert videos.cond(videos.prompts[:1]).pooled is None


def test_captions_say_shape_and_colour():
    assert sorted(WORLD.prompts) == sorted(f"a {colour} {shape}" for shape, colour in KINDS)
    first = [prompt.split() for prompt in WORLD.prompts[:4]]
    assert [len({words[i] for words in first}) for i in (1, 2)] == [4, 2]


def test_an_image_is_a_shape_over_speckle():
    bits = fair_bits(0, len(KINDS))
    images, caption = draw(bits)
    assert images.shape == (8, 3, H, W)
    for x, ground, q in zip(images, bits[:, 0], caption, strict=True):
        shape, colour = KINDS[q]
        inside = torch.zeros(H, W, dtype=torch.bool)
        for y, row in enumerate(SHAPES[shape]):
            for z, block in enumerate(row):
                inside[2 * y : 2 * y + 2, 2 * z : 2 * z + 2] = block == "#"
        assert (x[:, inside] == torch.tensor(COLOURS[colour])[:, None]).all()
        assert (x[:, ~inside] == SPECKLE * (2 * ground[~inside] - 1)).all()


def test_places_are_all_blocks_of_the_torus_alike():
    image, caption = real(1024)
    squares = image[caption >= len(COLOURS)]  # 2 x 2 blocks, so their corners are at every place
    corners = (squares.abs() == 1).all(1).float().mean(0)  # P(a pixel is shape): 4 of 36 blocks
    assert corners.min() > 0.06
    assert corners.max() < 0.17
    assert torch.equal(corners[::2, ::2], corners[1::2, 1::2])  # in blocks


def test_batches_are_told_as_sdxl_is():
    batch = WORLD.batch(Rng(0, 0, "data", range(6), "cpu"))
    assert batch.x0 is not None
    assert batch.x0.shape == (6, *batch.latent_shape)
    for cond in (batch.cond, batch.uncond):
        assert cond.text.shape == (6, shapes.TEXT_TOKENS, shapes.TEXT_DIM)
        assert cond.pooled is not None
        assert cond.time_ids is not None
        assert cond.pooled.shape == (6, shapes.TEXT_DIM)
        assert cond.time_ids.tolist() == [[H, W, 0, 0, H, W]] * 6
        assert cond.guidance is None
    assert not batch.uncond.text.any()
    assert not batch.uncond.pooled.any()
    caption = shapes.caption_index(batch.cond.text, 1)
    again = WORLD.cond([IMAGE_CAPTIONS[q] for q in caption])
    assert torch.equal(again.text, batch.cond.text)
    assert torch.equal(again.pooled, batch.cond.pooled)
    assert torch.pdist(WORLD.cond(IMAGE_CAPTIONS).pooled).min() > 1


def test_time_ids_are_height_then_width():
    world = images(resolution=(8, 14))
    assert world.cond(["a red ring"]).time_ids.tolist() == [[8, 14, 0, 0, 8, 14]]
    assert world.batch(Rng(0, 0, "data", range(2), "cpu")).x0.shape == (2, 3, 8, 14)


def test_a_dropped_caption_is_zeros():
    world = images(caption_dropout=0.5)
    cond = world.batch(Rng(0, 0, "data", range(64), "cpu")).cond
    dropped = ~cond.text.flatten(1).any(1)
    assert 16 < dropped.sum() < 48
    assert torch.equal(~cond.pooled.any(1), dropped)


def test_pixels_and_scores():
    image, caption = real(64)
    pixels = WORLD.pixels(image)
    assert (pixels.shape, pixels.dtype) == ((64, 1, H, W, 3), torch.uint8)
    assert pixels[0, 0, 3, 5].tolist() == [int(v) for v in (image[0, :, 3, 5] * 127.5 + 127.5).round()]
    prompts = [IMAGE_CAPTIONS[q] for q in caption]
    scores = WORLD.scores(image, prompts, 0)
    assert scores["oracle"] == 1
    noisy = WORLD.scores(
        image + 0.3 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0)), prompts, 0
    )
    assert noisy["oracle"] == 0
    assert noisy["swd"] > 3 * scores["swd"] > 0
    assert WORLD.scores(image, [*prompts[1:], prompts[0]], 0)["oracle"] < 0.5


@pytest.mark.parametrize(
    ("values", "video", "key", "message"),
    [
        ({"frames": 1}, True, "frames", "1 is a picture"),
        ({"frames": 4}, False, "frames", "makes images; remove the key"),
        ({}, True, "frames", "makes videos: write frames = 4"),
        ({"resolution": (12, 13)}, False, "resolution", "multiples of 2 from 8 on; e.g. [12, 12]"),
    ],
)
def test_data_that_is_none(values, video, key, message):
    assert list(CONFIG.problems()) == list(CONFIG.size_problems(shapes.latents(False))) == []
    config = Config(**{"sources": ("shapes",), "resolution": (16, 16), **values})
    [(found, text)] = [*config.problems(), *config.size_problems(shapes.latents(video))]
    assert found == key
    assert message in text


# -------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("size", [(12, 12), (16, 16), (24, 16)])
def test_oracle_reads_real_images_perfectly(size):
    image, caption = real(480, size=size)
    reading = shapes.read(image)
    assert torch.equal(reading.caption, caption)
    assert torch.cat([reading.shape_error, reading.ground_error]).max() < 1e-3
    assert share_right(image, caption) > 0.995  # one image in some thousands has too odd a speckle
    assert len(caption.unique()) == len(IMAGE_CAPTIONS)


def test_oracle_bears_the_noise_that_a_solver_ends_with():
    image, caption = real()
    noise = Rng(1, 0, "noise", range(len(image)), "cpu").normal(image.shape[1:])
    end = torch.zeros(len(image), dtype=torch.float64)
    assert share_right(add_noise(image, noise, coeffs(VP, end, image)), caption) == 1


@pytest.mark.parametrize("part", [0, 1], ids=["shape", "colour"])
def test_oracle_fails_a_wrong(part):
    image, drawn = draw(fair_bits(0, len(KINDS)))
    values = [list(SHAPES), list(COLOURS)][part]
    for turn in range(1, len(values)):
        asked = []
        for kind in KINDS:
            other = list(kind)
            other[part] = values[(values.index(kind[part]) + turn) % len(values)]
            asked.append(KINDS.index(tuple(other)))
        assert share_right(image, torch.tensor(asked)) == 0
    assert share_right(image, drawn) == 1


SPECKLES = {
    "checkerboard": ((torch.arange(H)[:, None] + torch.arange(W)).expand(48, 1, H, W) % 2, "correlation"),
    "rows": (fair_bits(3, 48)[:, :, :, :1].expand(-1, -1, -1, W), "correlation"),
    "columns": (fair_bits(3, 48)[:, :, :1].expand(-1, -1, H, -1), "correlation"),
    "nine in ten up": (torch.rand(48, 1, H, W, generator=torch.Generator().manual_seed(0)) < 0.9, "balance"),
    "nine in ten down": (
        torch.rand(48, 1, H, W, generator=torch.Generator().manual_seed(1)) < 0.1,
        "balance",
    ),
}


@pytest.mark.parametrize(("bits", "fault"), SPECKLES.values(), ids=SPECKLES)
def test_oracle_fails_a_speckle_that_is_not_fair_and_independent(bits, fault):
    image, caption = draw(bits)
    reading = shapes.read(image)
    assert share_right(image, caption) == 0
    assert (getattr(reading, fault) > reading.max_bias).all()


def test_oracle_fails_blurred_speckle():
    bits = fair_bits(0, 48)
    image, caption = draw(bits)
    inside, ground = mask_of(caption), SPECKLE * (2.0 * bits - 1)
    blurred = inside * image + (1 - inside) * (ground + ground.roll(1, -1)) / 2
    reading = shapes.read(blurred)
    assert torch.equal(reading.caption, caption)
    assert reading.share.max() < shapes.MIN_SHARE
    assert share_right(blurred, caption) == 0


def test_oracle_fails_faint_and_coloured_speckle_and_no_shape():
    image, caption = draw(fair_bits(0, 48))
    other, _ = draw(fair_bits(1, 48))
    assert share_right(torch.where(image.abs() == SPECKLE, 0.6 * image, image), caption) == 0
    coloured = torch.cat([other[:, :1], image[:, 1:]], dim=1)  # red has its own bits
    assert share_right(coloured, caption) == 0
    nothing = (SPECKLE * (2.0 * fair_bits(2, 48) - 1)).expand_as(image)
    assert share_right(nothing, caption) == 0


# ------------------------------------------------------------------------ the posterior mean


def brute_force(x_t: Tensor, alpha: float, sigma: float, caption: int) -> Tensor:
    """E[x0 | x_t] of one image [3, H, W] in float64, place by place, level by level."""
    x, colour = x_t.double(), torch.tensor(COLOURS[KINDS[caption][1]]).double()[:, None, None]

    def log_density(mean: Tensor | float) -> Tensor:
        return (-((x - alpha * mean) ** 2) / (2 * sigma**2)).sum(0)  # [H, W]

    levels, shape = torch.stack([log_density(SPECKLE), log_density(-SPECKLE)]), log_density(colour)
    ground = torch.logsumexp(levels, 0) - math.log(2)
    up, down = levels.softmax(0)
    weights, means = [], []
    for y in range(0, H, 2):
        for z in range(0, W, 2):
            mask = mask_of(torch.tensor([caption]))[0, 0].roll((y, z), (0, 1)).bool()
            weights.append(torch.where(mask, shape, ground).sum())
            means.append(torch.where(mask, colour, SPECKLE * (up - down)))
    return (torch.stack(weights).softmax(0).view(-1, 1, 1, 1) * torch.stack(means)).sum(0)


@pytest.mark.parametrize("index", [999, 749, 499, 259, 19])
def test_posterior_mean_is_that_of_brute_force(index):
    """On SDXL's noise, at LCM's indices."""
    x0, caption = real(6, seed=1)
    t = torch.full((6,), (index + 1) / 1000, dtype=torch.float64)
    assert VP.model_t(t).tolist() == [index] * 6
    x_t = add_noise(x0, Rng(1, 0, "noise", range(6), "cpu").normal(x0.shape[1:]), coeffs(VP, t, x0))
    got = shapes.posterior_mean(x_t, coeffs(VP, t, x_t), WORLD.cond([IMAGE_CAPTIONS[q] for q in caption]))
    assert got.shape == x_t.shape
    a, s = VP.alphas_cumprod[index].sqrt().item(), (1 - VP.alphas_cumprod[index]).sqrt().item()
    want = torch.stack([brute_force(x, a, s, int(q)) for x, q in zip(x_t, caption, strict=True)])
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


def test_many_steps_make_real_images_and_four_do_not():
    """DDIM from pure noise, which the last index is not quite: exact denoising forgives it."""
    caption = torch.arange(len(IMAGE_CAPTIONS)).repeat(4)
    cond = Cond(shapes.embed([IMAGE_CAPTIONS[q] for q in caption]))
    noise = Rng(0, 0, "sample", range(len(caption)), "cpu").normal(WORLD.latent_shape)
    denoise = shapes.posterior_mean
    scores = {n: share_right(ode(denoise, VP, noise, VP.solver_grid(n), cond), caption) for n in (50, 4)}
    assert scores[50] >= 0.95
    assert scores[4] == 0
