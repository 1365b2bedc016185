"""Line charts as inline SVG: axes, a legend, and names at the ends of the lines. Colours are CSS classes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import NamedTuple

Point = tuple[float, float]  # (step, value)

LEFT, RIGHT, TOP, BOTTOM = 46, 368, 8, 204  # of the plot, in a figure of 480 x 226


class Line(NamedTuple):
    name: str
    style: str  # CSS class
    points: Sequence[Point]

    @property
    def curve(self) -> Sequence[Point]:
        """Return what the eye follows: the points, or a long line's running median over a twentieth of it."""
        n, half = len(self.points), len(self.points) // 40
        if n < 80:
            return self.points
        centres = [*range(0, n - 1, max(1, n // 200)), n - 1]
        return [
            (self.points[i][0], median(v for _, v in self.points[max(0, i - half) : i + half + 1]))
            for i in centres
        ]


@dataclass(frozen=True)
class Plane:
    """Where steps and values lie in the figure."""

    last: int  # step
    marks: Sequence[float]  # ticks of the values; the first and the last bound the plot
    log: bool

    def x(self, step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / self.last

    def y(self, value: float) -> float:
        scale = math.log10 if self.log else float
        low, high = scale(self.marks[0]), scale(self.marks[-1])
        return BOTTOM - (BOTTOM - TOP) * (scale(value) - low) / (high - low)

    def polyline(self, points: Sequence[Point], style: str) -> str:
        corners = " ".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in points)
        return f'<polyline class="{style}" points="{corners}"/>'


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers, `about` steps of 1, 2 or 5, that enclose low < high."""
    unit = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next((n * unit for n in (1, 2, 5) if high - low <= about * n * unit), 10 * unit)
    return [k * step for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten, with 2 and 5 between when they are few, that enclose 0 < low < high."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if high < 100 * low else (1,)
    stride = math.ceil((last - first) / 5)
    marks = [d * 10.0**n for n in range(first, last + stride, stride) for d in digits]
    bottom = max(t for t in marks if t <= low)
    top = min(t for t in marks if t >= high)
    return [t for t in marks if bottom <= t <= top]


def plane(values: Sequence[float], last: int, bounds: tuple[float, float] | None) -> Plane:
    """Return the plane for values.

    Without bounds it is logarithmic when values span a factor of 30, else from zero unless that flattens the
    lines.
    """
    if bounds:
        return Plane(last, ticks(*bounds), False)
    low, high = min(values), max(values)
    if 0 < 30 * low < high:
        return Plane(last, log_ticks(low, high), True)
    if low == high or 0 < low < high / 3:
        low, high = min(low, 0.0), max(high, 0.0) or float(low == 0)
    return Plane(last, ticks(low, high), False)


def apart(heights: Sequence[float], gap: float, lowest: float) -> list[float]:
    """Move ascending heights of labels to lie a gap apart, none under the lowest (y grows downwards)."""
    out: list[float] = []
    for y in heights:
        out.append(max(y, out[-1] + gap) if out else y)
    for i in reversed(range(len(out))):
        out[i] = min(out[i], out[i + 1] - gap if i + 1 < len(out) else lowest)
    return out


def axes(p: Plane) -> str:
    parts = []
    for mark in p.marks:
        parts.append(f'<path class="grid" d="M{LEFT} {p.y(mark):.1f}H{RIGHT}"/>')
        parts.append(f'<text class="left" x="{LEFT - 7}" y="{p.y(mark) + 4:.1f}">{mark:.6g}</text>')
    for step in (tick for tick in ticks(0, p.last) if tick <= p.last and tick == int(tick)):
        parts.append(f'<path class="axis" d="M{p.x(step):.1f} {BOTTOM}v4"/>')
        parts.append(f'<text class="under" x="{p.x(step):.1f}" y="{BOTTOM + 17}">{step:,.0f}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>')
    return "".join(parts) + f'<text x="{RIGHT + 28}" y="{BOTTOM + 17}">step</text>'


def draw(p: Plane, line: Line) -> str:
    """Draw a line: a long one's points faint under its curve, a short one with dots that show their value."""
    lines = p.polyline(line.points, "line")
    if line.curve is not line.points:
        lines = p.polyline(line.points, "raw") + p.polyline(line.curve, "line")
    dots = []
    for step, value in line.points if len(line.points) <= 40 else ():
        label = f"<title>step {step:,}: {value:.4g}</title>"
        dots.append(f'<circle cx="{p.x(step):.1f}" cy="{p.y(value):.1f}" r="2.5">{label}</circle>')
    return f'<g class="{line.style}">{lines}{"".join(dots)}</g>'


def names(p: Plane, lines: Sequence[Line]) -> str:
    """Write every line's name at its end."""
    ends = sorted((p.y(line.curve[-1][1]) + 4, line.style, escape(line.name)) for line in lines)
    heights = apart([height for height, _, _ in ends], 14, BOTTOM + 4)
    return "".join(
        f'<text class="{style}" x="{RIGHT + 9}" y="{height:.1f}">{name}</text>'
        for height, (_, style, name) in zip(heights, ends, strict=True)
    )


def chart(
    title: str,
    note: str,
    lines: Sequence[Line],
    levels: Mapping[tuple[str, str], float],  # {(name, CSS class): value at all steps}
    last: int,
    bounds: tuple[float, float] | None = None,  # of the values; absent: as they are
) -> str:
    """Return a figure over steps 0 to `last`; the legend shows last values."""
    flat = [Line(*how, [(0, value), (last, value)]) for how, value in levels.items()]
    p = plane([value for line in (*flat, *lines) for _, value in line.points], last, bounds)
    drawn = "".join(f'<g class="{line.style}">{p.polyline(line.points, "line")}</g>' for line in flat)
    drawn += "".join(draw(p, line) for line in lines)
    legend = "".join(
        f'<li class="{line.style}"><span>{escape(line.name)}</span> {line.curve[-1][1]:.3g}</li>'
        for line in (*lines, *flat)
    )
    parts = [f"{line.name} from {line.points[0][1]:.3g} to {line.curve[-1][1]:.3g}" for line in lines]
    parts += [f"{line.name} {line.points[0][1]:.3g}" for line in flat]
    if p.log:
        note += ", log scale"
    label = escape(f"{title} over {last} steps: " + "; ".join(parts))
    return (
        f"<figure><figcaption><h3>{escape(title)}</h3><p>{escape(note)}</p><ul>{legend}</ul></figcaption>"
        f'<svg viewBox="0 0 480 226" role="img" aria-label="{label}">'
        f"{axes(p)}{drawn}{names(p, [*flat, *lines])}</svg></figure>"
    )
