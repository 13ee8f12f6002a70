"""Throughput and p99 against concurrency, drawn with Pillow."""

import math
import pathlib
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

Points = Sequence[tuple[int, float, float]]  # connections, units a second, p99 in ms
COLORS = (
    "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #17becf #8c564b #e377c2 #7f7f7f #bcbd22 #000000 "
    "#9edae5"
).split()
SCALE = 2  # drawn so much larger, then made smaller: soft edges
WIDTH, HEIGHT, LEFT, TOP, LINE = 480, 320, 64, 48, 18


def plot(series: Mapping[str, Points], path: pathlib.Path) -> None:
    """Two panels side by side, a line for each series, the legend below; a PNG.

    Raises: OSError when the file cannot be written.
    """
    legend = LINE * len(series)
    size = 2 * (WIDTH + LEFT) + 32, TOP + HEIGHT + 56 + legend + 8
    picture = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    draw = ImageDraw.Draw(picture)
    names, lines = list(series), list(series.values())
    _panel(draw, LEFT, "a second", [[(c, rate) for c, rate, _ in points] for points in lines])
    _panel(
        draw, 2 * LEFT + WIDTH, "p99, ms", [[(c, p99) for c, _, p99 in points] for points in lines]
    )
    for at, name in enumerate(names):
        y = TOP + HEIGHT + 56 + LINE * at
        draw.line(_scaled(LEFT, y + 8, LEFT + 24, y + 8), _color(at), 2 * SCALE)
        _text(draw, LEFT + 32, y, name)
    picture.resize(size, Image.Resampling.LANCZOS).save(path, "PNG")


def _panel(
    draw: ImageDraw.ImageDraw, left: int, title: str, lines: Sequence[Sequence[tuple[int, float]]]
) -> None:
    xs = sorted({x for line in lines for x, _ in line})
    low, high = math.log2(xs[0]), math.log2(xs[-1])
    step = nice(max(y for line in lines for _, y in line) / 5)
    top = step * max(1, math.ceil(max(y for line in lines for _, y in line) / step))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - low) / (high - low) if high > low else 0.5
        return left + 12 + across * (WIDTH - 24), TOP + HEIGHT * (1 - y / top)

    _text(draw, left, TOP - 28, title)
    for number in range(round(top / step) + 1):
        y = place(xs[0], number * step)[1]
        draw.line(_scaled(left, y, left + WIDTH, y), "#dddddd", SCALE)
        _text(draw, left - 8, y - 7, f"{number * step:g}", "ra")
    for tick in xs:
        _text(draw, place(tick, 0)[0], TOP + HEIGHT + 6, str(tick), "ma")
    _text(draw, left + WIDTH / 2, TOP + HEIGHT + 24, "at a time", "ma")
    for at, line in enumerate(lines):
        spots = [place(x, y) for x, y in line]
        flat = [coordinate for spot in spots for coordinate in spot]
        if len(spots) > 1:
            draw.line(_scaled(*flat), _color(at), 2 * SCALE, joint="curve")
        for x, y in spots:
            draw.ellipse(_scaled(x - 3, y - 3, x + 3, y + 3), _color(at))


def nice(step: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is at least `step`."""
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * 0.999)


def _scaled(*coordinates: float) -> list[float]:
    return [coordinate * SCALE for coordinate in coordinates]


def _color(at: int) -> str:
    return COLORS[at % len(COLORS)]


def _text(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, anchor: str = "la") -> None:
    font = ImageFont.load_default(12 * SCALE)
    draw.text((x * SCALE, y * SCALE), text, "black", font, anchor=anchor)
