"""Lines over an axis, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]

_FRAME, _GRID = (90, 90, 90), (225, 225, 225)


@dataclass(frozen=True)
class Line:
    """Points from left to right. width: pixels. dots: mark each point."""

    points: Sequence[Point]
    colour: Colour
    width: int = 1
    dots: bool = False


def draw_panel(
    draw: ImageDraw.ImageDraw,
    area: tuple[int, int, int, int],
    title: str,
    lines: Sequence[Line],
    right: float,
    heights: tuple[float, float],
    logarithmic: bool = False,
) -> None:
    """Draw lines, their frame, and five marks on each axis.

    Args:
        area: left, top, right and bottom of the frame in pixels; the marks need about 70 on its left and 20 below it,
            the title 20 above it.
        right: where the axis that starts at 0 ends.
        heights: values at the frame's bottom and top; both positive where the scale is logarithmic.
    """
    left, top, end, foot = area
    shape = math.log10 if logarithmic else float
    low, high = (shape(value) for value in heights)
    if low == high:
        low, high = low - 0.5, high + 0.5

    def place(point: Point) -> Point:
        share = (shape(point[1]) - low) / (high - low)
        return left + (end - left) * point[0] / right, top + (foot - top) * (1 - share)

    for i in range(5):
        y = top + (foot - top) * (1 - i / 4)
        value = low + (high - low) * i / 4
        draw.line([(left, y), (end, y)], fill=_GRID)
        draw.text((left - 6, y), f"{10**value if logarithmic else value:.4g}", fill=_FRAME, anchor="rm")
        mark = f"{right * i / 4:.0f}" if right >= 4 else f"{right * i / 4:.3g}"
        draw.text((left + (end - left) * i / 4, foot + 4), mark, fill=_FRAME, anchor="mt")
    draw.rectangle([(left, top), (end, foot)], outline=_FRAME)
    draw.text((left, top - 18), title, fill="black")
    for line in lines:
        places = [place(point) for point in line.points]
        draw.line(places, fill=line.colour, width=line.width)
        for x, y in places if line.dots else ():
            draw.ellipse([(x - 3, y - 3), (x + 3, y + 3)], fill=line.colour)
