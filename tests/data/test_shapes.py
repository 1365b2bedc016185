"""The built-in world: its oracle, its posterior mean in closed form, and its text.

B batch, C channel, T frames, H W space.
"""

import math
import tomllib
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdmd.batch import Batch, Cond
from fastdmd.data import shapes
from fastdmd.data.shapes import CAPTIONS, COLOURS, KINDS, MOTIONS, SHAPES, SPECKLE
from fastdmd.data.table import Config
from fastdmd.data.world import ShapesWorld
from fastdmd.models.families import FAMILIES
from fastdmd.rng import Rng
from fastdmd.sampler import ode
from fastdmd.schedule import FlowSchedule, add_noise, coeffs

DEMO = tomllib.loads((Path(__file__).parents[2] / "configs/tiny_dmd.toml").read_text("utf-8"))
_, T, H, W = SHAPE = (3, DEMO["data"]["frames"], *DEMO["data"]["resolution"])
WORLD = ShapesWorld(
    Config(sources=("shapes",), frames=T, resolution=(H, W)),
    FAMILIES["wan2.1"],
    (3, T, H, W),
    torch.device("cpu"),
)
FLOW = FlowSchedule(DEMO["schedule"]["flow_shift"])


@cache
def real(count: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Videos [B, 3, T, H, W] of the world and their captions [B]."""
    batch: Batch = WORLD.batch(Rng(seed, 0, "data", range(count), "cpu"))
    assert batch.x0 is not None
    return batch.x0, shapes.caption_index(batch.cond.text, T)


def fair_bits(seed: int, count: int) -> Tensor:
    return torch.randint(2, (count, T, H, W), generator=torch.Generator().manual_seed(seed))


def draw(bits: Tensor, caption: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Videos with given speckle bits, all captions in turn, at place (0, 0)."""
    if caption is None:
        caption = torch.arange(len(bits)) % len(CAPTIONS)
    return shapes.render(caption, torch.zeros(len(bits), 2, dtype=torch.int64), bits), caption


def share_right(video: Tensor, caption: Tensor) -> float:
    return shapes.right(shapes.read(video), caption).double().mean().item()


# --------------------------------------------------------------------------------- the world


def test_the_prompts_are_all_captions_and_the_first_differ_in_every_word():
    assert sorted(WORLD.prompts) == sorted(CAPTIONS)
    words = [prompt.split() for prompt in WORLD.prompts[:6]]
    assert [len({each[i] for each in words}) for i in (1, 2, 4)] == [4, 2, 4]  # colour, shape, motion


def test_a_video_is_a_moving_shape_over_speckle():
    bits = fair_bits(0, len(KINDS))
    video, _ = draw(bits)
    for x, mask, ground, (_, colour, _) in zip(video, shapes.templates(T, H, W), bits, KINDS, strict=True):
        inside = mask.bool()
        assert (x[:, inside] == torch.tensor(COLOURS[colour])[:, None]).all()
        assert (x[:, ~inside] == SPECKLE * (2 * ground[~inside] - 1)).all()


def test_shapes_move_as_the_caption_says():
    """All at one speed; y grows downward."""
    directions, speeds = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}, set()
    for mask, (_, _, motion) in zip(shapes.templates(T, H, W), KINDS, strict=True):
        dy, dx = directions[motion]
        moving = {
            v: [mask[0].roll((v * f * dy, v * f * dx), (0, 1)) for f in range(T)] for v in range(1, H // 2)
        }
        speeds |= {v for v, frames in moving.items() if torch.equal(torch.stack(frames), mask)} or {None}
    assert len(speeds) == 1
    assert None not in speeds


def test_place_moves_the_whole_video():
    bits = torch.ones(1, T, H, W, dtype=torch.int64)
    caption = torch.zeros(1, dtype=torch.int64)
    still, moved = (shapes.render(caption, torch.tensor([place]), bits) for place in ([0, 0], [3, 5]))
    assert torch.equal(moved, still.roll((3, 5), (3, 4)))


def test_pixels():
    video = torch.linspace(-1.2, 1.2, 3 * 2 * 4 * 5).view(1, 3, 2, 4, 5)
    got = shapes.pixels(video)
    assert (got.shape, got.dtype) == ((1, 2, 4, 5, 3), torch.uint8)
    assert (got[0, 0, 0, 0, 0], got[0, 1, 3, 4, 2]) == (0, 255)
    assert shapes.pixels(torch.zeros(1, 3, 1, 1, 1)).unique().tolist() == [128]


# -------------------------------------------------------------------------------- the oracle


def test_oracle_reads_real_videos_perfectly():
    video, caption = real(480)
    reading = shapes.read(video)
    assert torch.equal(reading.caption, caption)
    assert torch.cat([reading.shape_error, reading.ground_error]).max() < 1e-3
    assert (reading.share == 1).all()
    assert share_right(video, caption) == 1
    assert len(caption.unique()) == len(CAPTIONS)


def test_oracle_bears_a_little_noise():
    video, caption = real()
    noise = Rng(1, 0, "noise", range(len(video)), "cpu").normal(video.shape[1:])
    assert share_right(video + 0.03 * noise, caption) == 1


@pytest.mark.parametrize("part", [0, 1, 2], ids=["shape", "colour", "motion"])
def test_oracle_fails_a_wrong(part):
    """One word of the caption is another: everything else of the video is right."""
    video, drawn = draw(fair_bits(0, len(CAPTIONS)))
    values = [list(SHAPES), list(COLOURS), list(MOTIONS)][part]
    for turn in range(1, len(values)):
        asked = []
        for kind in KINDS:
            other = list(kind)
            other[part] = values[(values.index(kind[part]) + turn) % len(values)]
            asked.append(KINDS.index(tuple(other)))
        assert share_right(video, torch.tensor(asked)) == 0
    assert share_right(video, drawn) == 1


def alike(axis: int) -> Tensor:
    """Return bits in equal pairs along an axis (1 T, 2 H, 3 W): every second two neighbours are equal."""
    bits = fair_bits(3, 48)
    return bits.index_select(axis, torch.arange(bits.shape[axis]) // 2 * 2)


SPECKLES = {
    "frozen pairs of frames": (alike(1), "correlation"),
    "pairs of rows": (alike(2), "correlation"),
    "pairs of columns": (alike(3), "correlation"),
    "checkerboard": ((torch.arange(H)[:, None] + torch.arange(W)).expand(48, T, H, W) % 2, "correlation"),
    "three in four up": (fair_bits(4, 48) | fair_bits(5, 48), "balance"),
    "three in four down": (fair_bits(4, 48) & fair_bits(5, 48), "balance"),
}


@pytest.mark.parametrize(("bits", "fault"), SPECKLES.values(), ids=SPECKLES)
def test_oracle_fails_a_speckle_that_is_not_fair_and_independent(bits, fault):
    """Refuse pairs by that fault alone: every pixel is at a level and the caption is right.

    Pairs spread their balance a little.
    """
    video, caption = draw(bits)
    reading = shapes.read(video)
    assert share_right(video, caption) == 0
    repaired = reading._replace(**{fault: torch.zeros(len(video))})
    assert shapes.right(repaired, caption).double().mean() > 0.9


def test_oracle_fails_one_sided_speckle():
    video, caption = draw(torch.ones(48, T, H, W, dtype=torch.int64))
    assert share_right(video, caption) == 0
    assert (shapes.read(video).balance == 1).all()


def test_oracle_fails_blurred_speckle():
    """Refuse pixels that are means of two neighbours: a teacher with few steps ends at levels and zeros."""
    video, caption = draw(fair_bits(0, 48))
    inside = shapes.templates(T, H, W)[caption][:, None]
    ground = SPECKLE * (2.0 * fair_bits(0, 48)[:, None] - 1)
    blurred = inside * video + (1 - inside) * (ground + ground.roll(1, -1)) / 2
    reading = shapes.read(blurred)
    assert torch.equal(reading.caption, caption)
    assert reading.share.max() < shapes.MIN_SHARE
    assert share_right(blurred, caption) == 0


def test_oracle_fails_faint_speckle():
    video, caption = draw(fair_bits(0, 48))
    faint = torch.where(video.abs() == SPECKLE, 0.6 * video, video)
    assert (shapes.read(faint).share == 0).all()
    assert share_right(faint, caption) == 0


def test_oracle_fails_coloured_speckle():
    video, caption = draw(fair_bits(0, 48))
    other, _ = draw(fair_bits(1, 48))
    video[:, 0] = other[:, 0]  # red has its own bits
    assert (shapes.read(video).ground_error > shapes.MAX_GROUND_ERROR).all()
    assert share_right(video, caption) == 0


def test_oracle_fails_a_shape_that_is_not_there_throughout():
    video, caption = draw(fair_bits(0, 96))
    ground = (SPECKLE * (2.0 * fair_bits(0, 96)[:, None] - 1)).expand_as(video)
    half = torch.cat([video[:, :, : T // 2], ground[:, :, T // 2 :]], dim=2)
    assert share_right(half, caption) == 0
    assert share_right(ground, caption) == 0


def test_oracle_fails_a_shape_missing_in_one_frame():
    video, caption = draw(fair_bits(0, 96))
    ground = (SPECKLE * (2.0 * fair_bits(1, 96)[:, None] - 1)).expand_as(video)
    holed = torch.cat([video[:, :, :1], ground[:, :, 1:2], video[:, :, 2:]], dim=2)
    assert torch.equal(shapes.read(holed).caption, caption)
    assert share_right(holed, caption) < 0.03  # a small shape over a speckle of nearly its colour


def test_oracle_fails_a_second_ring_in_one_frame():
    """At 4 x 12 x 12, the size that the limit was set at."""
    rings = torch.tensor([i for i, caption in enumerate(shapes.CAPTIONS) if "ring" in caption])
    bits = torch.randint(2, (len(rings), 4, 12, 12), generator=torch.Generator().manual_seed(0))
    place = torch.zeros(len(rings), 2, dtype=torch.int64)
    video, other = shapes.render(rings, place, bits), shapes.render(rings, place + 6, bits)
    assert share_right(video, rings) == 1
    twice = video.clone()
    twice[:, :, 0] = torch.where(other[:, :, 0].abs() == 1, other[:, :, 0], video[:, :, 0])
    assert torch.equal(shapes.read(twice).caption, rings)
    assert share_right(twice, rings) == 0


# ------------------------------------------------------------------------ the posterior mean


def brute_force(x_t: Tensor, t: float, caption: int) -> Tensor:
    """E[x0 | x_t] of one video [3, T, H, W] in float64, place by place, level by level."""
    x, alpha, sigma = x_t.double(), 1 - t, t
    colour = shapes.palette(T)[caption].double()[:, None, None, None]

    def log_density(mean: Tensor | float) -> Tensor:
        return (-((x - alpha * mean) ** 2) / (2 * sigma**2)).sum(0)  # [T, H, W]

    levels, shape = torch.stack([log_density(SPECKLE), log_density(-SPECKLE)]), log_density(colour)
    ground = torch.logsumexp(levels, 0) - math.log(2)
    up, down = levels.softmax(0)
    ground_mean = SPECKLE * (up - down)
    weights, means = [], []
    for y in range(0, H, shapes.BLOCK):
        for w in range(0, W, shapes.BLOCK):
            mask = shapes.templates(T, H, W)[caption].roll((y, w), (1, 2)).bool()
            weights.append(torch.where(mask, shape, ground).sum())
            means.append(torch.where(mask, colour, ground_mean))
    return (torch.stack(weights).softmax(0).view(-1, 1, 1, 1, 1) * torch.stack(means)).sum(0)


@pytest.mark.parametrize("t", [0.999, 0.95, 0.9, 0.8, 0.5, 0.1])
def test_posterior_mean_is_that_of_brute_force(t):
    x0, caption = real(6, seed=1)
    times = torch.full((6,), t, dtype=torch.float64)
    x_t = add_noise(x0, Rng(1, 0, "noise", range(6), "cpu").normal(x0.shape[1:]), coeffs(FLOW, times, x0))
    got = shapes.posterior_mean(
        x_t, coeffs(FLOW, times, x_t), Cond(shapes.embed([CAPTIONS[i] for i in caption]))
    )
    want = torch.stack([brute_force(x, t, int(q)) for x, q in zip(x_t, caption, strict=True)])
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_posterior_mean_of_speckle():
    """Where the shape is known, a pixel outside is a tanh(a alpha sum_c x_t / sigma^2)."""
    t = 0.4
    x0, caption = real(6, seed=2)
    times = torch.full((6,), t, dtype=torch.float64)
    x_t = add_noise(x0, Rng(2, 0, "noise", range(6), "cpu").normal(x0.shape[1:]), coeffs(FLOW, times, x0))
    got = shapes.posterior_mean(
        x_t, coeffs(FLOW, times, x_t), Cond(shapes.embed([CAPTIONS[i] for i in caption]))
    )
    want = SPECKLE * torch.tanh(SPECKLE * (1 - t) * x_t.sum(1, keepdim=True) / t**2).expand_as(x0)
    outside = x0.abs() == SPECKLE
    torch.testing.assert_close(got[outside], want[outside], rtol=0, atol=1e-4)


def test_many_steps_make_real_videos_and_three_do_not():
    cond = Cond(shapes.embed(CAPTIONS))
    noise = Rng(0, 0, "sample", range(len(CAPTIONS)), "cpu").normal(SHAPE)
    denoise, caption = shapes.posterior_mean, torch.arange(len(CAPTIONS))
    scores = {n: share_right(ode(denoise, FLOW, noise, FLOW.solver_grid(n), cond), caption) for n in (50, 3)}
    assert scores[50] >= 0.95
    assert scores[3] == 0


# ---------------------------------------------------------------------------------- the text


def test_embeddings_are_fixed_a_word_each():
    """The same on every machine, as checkpoints depend on it."""
    text = shapes.embed(["a red ring moving up", ""])
    assert text.shape == (2, shapes.TEXT_TOKENS, shapes.TEXT_DIM)
    assert not text[1].any()
    assert not text[0, 5:].any()
    shapes.word_vector.cache_clear()
    assert torch.equal(shapes.embed(["a red ring moving up", ""]), text)
    assert torch.equal(shapes.embed(["red"])[0, 0], text[0, 1])
    words = torch.stack([shapes.word_vector(word) for word in (*SHAPES, *COLOURS, *MOTIONS)])
    assert torch.pdist(words).min() > 1
    torch.testing.assert_close(text[0, 1, :3], torch.tensor([-0.404056, -0.326277, -0.964477]))


def test_captions_are_read_back_and_others_refused():
    assert torch.equal(shapes.caption_index(shapes.embed(CAPTIONS), T), torch.arange(len(CAPTIONS)))
    with pytest.raises(ValueError, match="none of the built-in captions"):
        shapes.caption_index(shapes.embed([CAPTIONS[0], ""]), T)
    with pytest.raises(ValueError, match="9 words"):
        shapes.embed(["one two three four five six seven eight nine"])
