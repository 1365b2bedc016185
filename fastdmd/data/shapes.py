"""The built-in world: short procedural videos with an exact oracle and an exact posterior mean.

A video [C=3, T, H, W] is a moving coloured shape over a two-level grey speckle. The caption says shape,
colour and motion; the place is uniform on the torus, in blocks. Where the shape is not, every pixel is
+SPECKLE or -SPECKLE with equal odds, independently, the same in all three channels: the fine random detail
that few steps of a teacher lose.

An image [C=3, H, W] is a video of one frame, where nothing moves and the caption says shape and colour only.

B batch, C channel, T frames, H W space, Q captions, S text tokens, D text_dim.
"""

import hashlib
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from fastdmd.batch import Cond
from fastdmd.latents import LatentSpec
from fastdmd.schedule import Coeffs, per_sample

SPECKLE = 0.4
MAX_SHAPE_ERROR, MAX_GROUND_ERROR, MIN_SHARE, MAX_BIAS = 0.5, 0.25, 0.75, 0.2  # what the oracle calls right
# standard deviations, 1 / sqrt(pixels), that an image's speckle may be off: the MAX_BIAS of images
IMAGE_DEVIATIONS = 4.5
# pixels; shapes, places and motions are in blocks, a network's patch: then every token is all shape or none
BLOCK = 2
TEXT_TOKENS, TEXT_DIM = 8, 32
COLOURS = {
    "red": (1.0, -1.0, -1.0),
    "green": (-1.0, 1.0, -1.0),
    "blue": (-1.0, -1.0, 1.0),
    "yellow": (1.0, 1.0, -1.0),
}
MOTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # blocks a frame
SHAPES = {
    "ring": ("###", "# #", "###"),
    "square": ("##", "##"),
}
KINDS = list(product(SHAPES, COLOURS, MOTIONS))
STILL = list(product(SHAPES, COLOURS, ["nowhere"]))  # the kinds of images
CAPTIONS = [f"a {colour} {shape} moving {motion}" for shape, colour, motion in KINDS]
IMAGE_CAPTIONS = [f"a {colour} {shape}" for shape, colour, _ in STILL]


def latents(video: bool) -> LatentSpec:
    """Return the sizes of the world's latents, which are its pixels: of videos, or of images."""
    return LatentSpec(
        channels=3,
        spatial=1,
        temporal=1 if video else None,
        multiple=BLOCK,
        least=4 * BLOCK,
        usual_frames=4 if video else None,
        usual_resolution=(12, 12),
    )


def kinds(T: int) -> list[tuple[str, str, str]]:
    """Return the (shape, colour, motion) of every caption for T frames."""
    return KINDS if T > 1 else STILL


def captions(T: int) -> list[str]:
    return CAPTIONS if T > 1 else IMAGE_CAPTIONS


def as_video(x: Tensor) -> Tensor:
    """Return images [B, C, H, W] as videos of one frame, and videos [B, C, T, H, W] as they are."""
    return x[:, :, None] if x.ndim == 4 else x


@lru_cache(maxsize=8)
def templates(T: int, H: int, W: int) -> Tensor:
    """Return the mask of each of captions(T) at place (0, 0), float32 [Q, T, H, W]."""
    masks = []
    for shape, _, motion in kinds(T):
        still = torch.zeros(H, W)
        for y, row in enumerate(SHAPES[shape]):
            for x, block in enumerate(row):
                still[y * BLOCK : (y + 1) * BLOCK, x * BLOCK : (x + 1) * BLOCK] = block == "#"
        dy, dx = MOTIONS[motion] if T > 1 else (0, 0)
        masks.append(torch.stack([still.roll((BLOCK * dy * f, BLOCK * dx * f), (0, 1)) for f in range(T)]))
    return torch.stack(masks)


def palette(T: int) -> Tensor:
    """Return the colour of every caption for T frames, float32 [Q, C]."""
    return torch.tensor([COLOURS[colour] for _, colour, _ in kinds(T)])


def render(caption: Tensor, place: Tensor, bits: Tensor) -> Tensor:
    """Return videos [B, 3, T, H, W] of captions at places, over speckle.

    caption: int64 [B]. place: int64 [B, 2]. bits: the speckle, 0 or 1, [B, T, H, W].
    """
    _, T, H, W = bits.shape
    mask = torch.stack(
        [
            m.roll((int(y), int(x)), (1, 2))
            for m, (y, x) in zip(templates(T, H, W)[caption], place, strict=True)
        ]
    )[:, None]
    ground = SPECKLE * (2 * bits[:, None].float() - 1)
    return mask * palette(T)[caption][:, :, None, None, None] + (1 - mask) * ground


@lru_cache(maxsize=256)
def word_vector(word: str) -> Tensor:
    """Return a fixed random direction for a word, float32 [D], the same on every machine."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little") >> 1
    return torch.randn(TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def embed(captions: list[str]) -> Tensor:
    """Return text embeddings float32 [B, S, D] of captions, one token per word.

    Zeros follow the last word, as Wan pads, so "" is all zeros.
    """
    out = torch.zeros(len(captions), TEXT_TOKENS, TEXT_DIM)
    for row, caption in zip(out, captions, strict=True):
        words = caption.split()
        if len(words) > TEXT_TOKENS:
            raise ValueError(
                f"caption {caption!r} has {len(words)} words; the built-in world reads {TEXT_TOKENS}"
            )
        for i, word in enumerate(words):
            row[i] = word_vector(word)
    return out


def caption_index(text: Tensor, T: int) -> Tensor:
    """Return which of captions(T) each embedding of [B, S, D] is, int64 [B]."""
    known = embed(captions(T)).to(text.device).flatten(1)
    # not by products: x^2 + y^2 - 2 xy is off by 1e-2 on some processors where x is y
    distance = torch.cdist(text.float().flatten(1), known, compute_mode="donot_use_mm_for_euclid_dist")
    if float(distance.min(dim=1).values.max()) > 1e-2:
        raise ValueError("an embedding is none of the built-in captions")
    return distance.argmin(dim=1)


def correlate(field: Tensor, mask: Tensor) -> Tensor:
    """Sum a field over a mask, both [.., T, H, W], moved to each place on the torus -> [.., H, W]."""
    product = torch.fft.rfft2(field) * torch.fft.rfft2(mask).conj()
    return torch.fft.irfft2(product.sum(-3), s=field.shape[-2:])


class Reading(NamedTuple):
    """What the oracle sees in each video; float32 or int64 [B]."""

    caption: Tensor  # index of the nearest one
    shape_error: Tensor  # root mean square distance to its nearest rendering, over the shape's pixels
    ground_error: Tensor  # the same over the other pixels, where the nearest level is the truth
    share: Tensor  # of background pixels within 25 % of a level
    balance: Tensor  # mean sign of background pixels, 0 is even
    correlation: Tensor  # largest |correlation| of the signs of neighbours along t, h, w
    max_bias: float  # of balance and correlation


def read(x: Tensor) -> Reading:
    """Read videos by the exact oracle.

    It finds the nearest (caption, place) by squared distance, then judges the speckle outside that shape.
    x [B, 3, T, H, W], or images [B, 3, H, W].
    """
    video = as_video(x).float()
    B, _, T, H, W = video.shape
    masks, colours = templates(T, H, W), palette(T)
    levels = SPECKLE * torch.tensor([1.0, -1.0])
    ground = (video[:, None] - levels[:, None, None, None, None]).square().mean(2).amin(1)  # [B, T, H, W]
    best = torch.full((B,), torch.inf)
    caption, place = torch.zeros(B, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)
    for q, (mask, colour) in enumerate(zip(masks, colours, strict=True)):
        inside = (video - colour[:, None, None, None]).square().mean(1)
        cost, where = correlate(inside - ground, mask).flatten(1).min(1)
        better = cost < best
        best = torch.where(better, cost, best)
        caption, place = torch.where(better, q, caption), torch.where(better, where, place)
    shape = torch.stack(
        [m.roll((int(p) // W, int(p) % W), (1, 2)) for m, p in zip(masks[caption], place, strict=True)]
    )
    outside = 1 - shape
    inside = (video - colours[caption][:, :, None, None, None]).square().mean(1)
    grey = video.mean(1)
    n = outside.sum((1, 2, 3))
    near = ((video.abs() - SPECKLE).abs() <= 0.25 * SPECKLE).float().mean(1)
    sign = grey.sign() * outside
    balance = sign.sum((1, 2, 3)) / n
    centred = (grey.sign() - balance[:, None, None, None]) * outside
    variance = centred.square().sum((1, 2, 3)) / n
    correlation = torch.stack(
        [
            (centred * centred.roll(1, d)).sum((1, 2, 3))
            / (outside * outside.roll(1, d)).sum((1, 2, 3)).clamp(min=1)
            for d in ((1, 2, 3) if T > 1 else (2, 3))
        ]
    )
    correlation = (correlation / variance.clamp(min=1e-6)).abs().amax(0)
    shape_error = ((inside * shape).sum((1, 2, 3)) / shape.sum((1, 2, 3))).sqrt()
    ground_error = ((ground * outside).sum((1, 2, 3)) / n).sqrt()
    share = (near * outside).sum((1, 2, 3)) / n
    max_bias = MAX_BIAS if T > 1 else IMAGE_DEVIATIONS / (H * W) ** 0.5
    return Reading(caption, shape_error, ground_error, share, balance.abs(), correlation, max_bias)


def posterior_mean(x_t: Tensor, c: Coeffs, cond: Cond) -> Tensor:
    """Return E[x0 | x_t, caption] of this world in closed form: a teacher without training.

    The posterior over places is a softmax of log likelihoods (a correlation on the torus); given the place a
    shape pixel is its colour and a speckle pixel is a tanh(a alpha sum_c x_t / sigma^2). x_t [B, 3, T, H, W],
    or images [B, 3, H, W].
    """
    shape, x_t = x_t.shape, as_video(x_t)
    alpha, var = per_sample(c.alpha, x_t), per_sample(c.sigma, x_t).square()
    which = caption_index(cond.text, x_t.shape[2])
    mask = templates(*x_t.shape[2:])[which].to(x_t)  # [B, T, H, W]
    colour = palette(x_t.shape[2])[which].to(x_t)[:, :, None, None, None]
    a, C = SPECKLE, x_t.shape[1]
    logit = a * alpha * x_t.sum(1, keepdim=True) / var
    # log p(x_t | shape) - log p(x_t | speckle) per pixel, terms common to both left out
    log_shape = (alpha * (x_t * colour).sum(1, keepdim=True) - alpha**2 * C / 2) / var
    log_ground = torch.logaddexp(logit, -logit) - 0.6931471805599453 - C * (a * alpha) ** 2 / (2 * var)
    score = correlate((log_shape - log_ground)[:, 0], mask)
    odd = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device)
    odd[::BLOCK, ::BLOCK] = False
    score = score.masked_fill(odd, -torch.inf)
    posterior = score.flatten(1).softmax(1).view_as(score)[:, None]
    spread = torch.fft.rfft2(posterior) * torch.fft.rfft2(mask)
    inside = torch.fft.irfft2(spread, s=x_t.shape[-2:])[:, None].clamp(0, 1)  # P(pixel is shape)
    return (inside * colour + (1 - inside) * a * logit.tanh()).view(shape)


def right(reading: Reading, caption: Tensor) -> Tensor:
    """Return which videos have everything right, bool [B].

    Everything is the caption's shape, colour and motion, and a true speckle.

    A shape that is missing in one of four frames is a shape error of about 0.54, and a second ring in one of
    them a ground error of 0.253: neither may be. A true speckle has three quarters of its pixels within 25 %
    of a level (few steps of an exact denoiser have a quarter there, eight have nearly all), evenly and
    independent: balance and correlations of real videos have a standard deviation of 0.045 at 12 x 12 pixels,
    and the limit is over four of them away. An image has too few pixels for a limit that is the same at every
    size.
    """
    return (
        (reading.caption == caption)
        & (reading.shape_error < MAX_SHAPE_ERROR)
        & (reading.ground_error < MAX_GROUND_ERROR)
        & (reading.share > MIN_SHARE)
        & (reading.balance < reading.max_bias)
        & (reading.correlation < reading.max_bias)
    )


def pixels(x: Tensor) -> Tensor:
    """Return videos [B, 3, T, H, W], or images [B, 3, H, W], as uint8 [B, T, H, W, 3] on the host.

    -1 .. 1 becomes 0 .. 255.
    """
    levels = as_video(x).float().cpu().clamp(-1, 1) * 127.5 + 127.5
    return levels.round().to(torch.uint8).permute(0, 2, 3, 4, 1)
