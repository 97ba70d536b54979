"""A run's curve: lines of JSON by step, and their picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..checkpoints.files import replacing
from ..errors import CheckpointError
from ..media import chart

CURVE_FILE = "curve.jsonl"
PICTURE_FILE = "curve.png"
Line = dict[str, Any]
Points = list[tuple[float, float]]

_PANEL = (900, 220)  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 16, 26, 26
_RAW, _SMOOTH = (170, 195, 230), (20, 70, 160)


def add(path: Path, line: Line) -> None:
    """Append a line; a value that is NaN or infinite becomes null.

    Raises:
        CheckpointError: the file cannot be written.
    """
    shown = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(shown) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def log(path: Path, line: Line) -> None:
    """Append a line and print it."""
    add(path, line)
    print("  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()), flush=True)


def read(path: Path) -> list[Line]:
    """All whole lines of a curve, none where there is no file; a last line that a kill cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def cut(path: Path, step: int) -> None:
    """Drop what lies after a step: the run that goes on from there makes it again."""
    kept = [line for line in read(path) if line["step"] <= step]
    with replacing(path) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def plot(lines: Sequence[Line], path: Path) -> None:
    """Draw a curve as PNG, a panel for each value over the steps, the moving mean of a twentieth of it on top.

    The scale is logarithmic where all of a value is positive and spans more than a factor of ten.
    """
    names = [key for key in dict.fromkeys(key for line in lines for key in line) if key not in ("step", "seconds")]
    series = {name: [(line["step"], line[name]) for line in lines if line.get(name) is not None] for name in names}
    series = {name: points for name, points in series.items() if any(value for _, value in points)}
    picture = Image.new("RGB", (_PANEL[0], max(1, len(series)) * _PANEL[1]), "white")
    draw = ImageDraw.Draw(picture)
    last = max((line["step"] for line in lines), default=1)
    for row, (name, points) in enumerate(series.items()):
        _panel(draw, row * _PANEL[1], name, points, last)
    with replacing(path) as partial:
        picture.save(partial)


def _panel(draw: ImageDraw.ImageDraw, top: int, name: str, points: Points, last: float) -> None:
    values = [value for _, value in points]
    low, high = min(values), max(values)
    logarithmic = low > 0 and high > 10 * low
    title = f"{name}: {values[-1]:.5g} at step {points[-1][0]:.0f}{', logarithmic' if logarithmic else ''}"
    area = (_LEFT, top + _TOP, _PANEL[0] - _RIGHT, top + _PANEL[1] - _BOTTOM)
    drawn = [chart.Line(points, _RAW), chart.Line(list(_smooth(points)), _SMOOTH, width=2)]
    chart.draw_panel(draw, area, title, drawn, last, (low, high), logarithmic)


def _smooth(points: Points) -> Iterator[tuple[float, float]]:
    """Means over windows of a twentieth of the points, at the windows' ends."""
    size = max(1, len(points) // 20)
    for end in range(size, len(points) + 1):
        yield points[end - 1][0], sum(value for _, value in points[end - size : end]) / size
