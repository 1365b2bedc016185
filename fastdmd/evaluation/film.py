"""Moving pictures of a report: one WebP fitted to a page, and one montage of all models."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageSequence

from fastdmd.evaluation.summary import read_run

INK, FAINT, GAP, CAPTION = "#1d1f23", "#666b73", 12, 24  # of the montage, lengths in pixels
CELL, LIMIT = 192, 384  # pixels: small pictures grow in whole steps to CELL wide, large ones shrink to LIMIT


def fit(frame: Image.Image) -> Image.Image:
    """Enlarge small pictures by a whole number, and reduce large ones."""
    if frame.width > LIMIT:
        return frame.resize((LIMIT, round(frame.height * LIMIT / frame.width)), Image.Resampling.LANCZOS)
    n = max(1, CELL // frame.width)
    return frame.resize((n * frame.width, n * frame.height), Image.Resampling.NEAREST)


def film(path: Path) -> list[tuple[Image.Image, int]]:
    """Return the fitted frames of a WebP, each with its milliseconds.

    The encoder has joined equal frames; a still lasts 0.
    """
    with Image.open(path) as image:  # converting loads the frame, which sets its duration
        return [
            (fit(frame.convert("RGB")), int(frame.info["duration"]))
            for frame in ImageSequence.Iterator(image)
        ]


def save(path: Path | io.BytesIO, frames: Sequence[tuple[Image.Image, int]], lossless: bool) -> None:
    (first, _), *rest = frames
    times = [ms for _, ms in frames]
    images = [image for image, _ in rest]
    first.save(
        path,
        "WEBP",
        save_all=True,
        append_images=images,
        duration=times,
        loop=0,
        lossless=lossless,
        quality=80,
    )


def comparison(folder: Path, prompts: Sequence[str], path: Path) -> None:
    """Write one moving picture with captions: one row per prompt, one column per model."""
    models = [model for model in read_run(folder)[1] if len(model.videos) >= len(prompts)]
    films = [[film(model.videos[i]) for model in models] for i in range(len(prompts))]
    tick = min([ms for row in films for each in row for _, ms in each if ms] or [1000])
    clips = [
        [[image for image, ms in each for _ in range(max(1, ms // tick))] for each in row] for row in films
    ]
    width, height = clips[0][0][0].size
    font, small = ImageFont.load_default(14), ImageFont.load_default(13)
    size = (len(models) * (width + GAP) + GAP, len(prompts) * (height + CAPTION + GAP) + CAPTION + GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, model in enumerate(models):
        draw.text((GAP + column * (width + GAP), GAP), model.label, INK, font)
    tops = [GAP + CAPTION + row * (height + CAPTION + GAP) for row in range(len(prompts))]
    for top, prompt in zip(tops, prompts, strict=True):
        draw.text((GAP, top + 4), clipped(prompt, small, size[0] - 2 * GAP), FAINT, small)
    frames = []
    for t in range(max(len(clip) for row in clips for clip in row)):
        frame = sheet.copy()
        for top, row in zip(tops, clips, strict=True):
            for column, clip in enumerate(row):
                frame.paste(clip[t % len(clip)], (GAP + column * (width + GAP), top + CAPTION))
        frames.append((frame, tick))
    save(path, frames, lossless=width <= CELL)


def clipped(text: str, font: Any, width: float) -> str:
    """Return text as one line that fits."""
    text = " ".join(text.split())
    line = text
    while font.getlength(line) > width:
        text = text[:-1].rstrip()
        line = text + "..."
    return line
