"""How a step grows with tokens and with top-k: measured times and, thin beside them, the bound of the products alone.

    turbowan bench transformer --size 1.3B --vary tokens --vary top-k --json > growth.jsonl
    turbowan bench transformer --size 14B --vary tokens --vary top-k --json >> growth.jsonl
    python benchmarks/growth.py growth.jsonl                  # writes growth.png beside it
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from turbowan.bench.compare import read_records
from turbowan.checkpoints.files import replacing
from turbowan.errors import RequestError, TurbowanError
from turbowan.media.chart import Line, draw_panel

Record = dict[str, Any]
AXES = {"tokens": "top_k", "top_k": "tokens"}  # what runs along a panel's axis, and what stands still meanwhile
NAMES = {"tokens": "tokens", "top_k": "top-k"}
WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 30
COLOURS = ((20, 70, 160), (190, 70, 20), (30, 130, 60), (130, 50, 140), (120, 120, 20), (20, 130, 140))


def measured(paths: Sequence[Path]) -> list[Record]:
    """The transformer's records, of several of one case the fastest; without steps that failed.

    Raises:
        RequestError: a file cannot be read, there is none of them, or they are of several GPUs.
    """
    found = [record for record in read_records(paths).values() if {"ms", "size", "bound_ms"} <= record.keys()]
    gpus = sorted({record["gpu"] for record in found})
    if len(gpus) != 1:
        raise RequestError(f"steps measured on one GPU are wanted, found {' and '.join(gpus) or 'none'}")
    return found


def curves(records: Sequence[Record], axis: str) -> dict[str, list[Record]]:
    """By precision and attention, records in the order of `axis`: of all that share what stands still, the most."""
    found = {}
    for kind in dict.fromkeys(f"{record['precision']} {record['attention']}" for record in records):
        by_other = defaultdict(list)
        for record in records:
            if kind == f"{record['precision']} {record['attention']}":
                by_other[record["shape"][AXES[axis]]].append(record)
        curve = sorted(max(by_other.values(), key=len), key=lambda record: record["shape"][axis])
        if len(curve) > 1:
            found[kind] = curve
    return found


def end_of_axis(value: float) -> float:
    """The first end not below the value whose quarters, where the axis is marked, are round."""
    power = 10.0 ** math.floor(math.log10(value / 4))
    return 4 * power * next(mark for mark in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if 4 * mark * power >= value)


def draw(records: Sequence[Record], path: Path) -> None:
    """A row for each size of model; on the left over tokens, on the right over top-k.

    Raises:
        RequestError: nothing grows.
    """
    by_size = defaultdict(list)
    for record in records:
        by_size[record["size"]].append(record)
    panels = {(size, axis): curves(some, axis) for size, some in by_size.items() for axis in AXES}
    if not any(panels.values()):
        raise RequestError("no two steps differ in tokens or in top-k alone: there is no curve to draw")
    picture = Image.new("RGB", (2 * WIDTH, len(by_size) * HEIGHT), "white")
    canvas = ImageDraw.Draw(picture)
    for i, ((size, axis), found) in enumerate(panels.items()):
        if found:
            _panel(canvas, i % 2 * WIDTH, i // 2 * HEIGHT, size, axis, found)
    with replacing(path) as partial:
        picture.save(partial, format="PNG")


def _panel(
    canvas: ImageDraw.ImageDraw, left: int, top: int, size: str, axis: str, found: dict[str, list[Record]]
) -> None:
    lines, legend = [], []
    for (kind, curve), colour in zip(found.items(), COLOURS * len(found), strict=False):
        pale = tuple(255 - (255 - value) * 2 // 5 for value in colour)
        lines.append(Line([(record["shape"][axis], record["bound_ms"]) for record in curve], pale))
        lines.append(Line([(record["shape"][axis], record["ms"]["p50"]) for record in curve], colour, 2, dots=True))
        shares = [record["bound_ms"] / record["ms"]["p50"] for record in curve]
        legend.append((f"{kind}, {shares[0]:.2f} to {shares[-1]:.2f} of the bound (thin)", colour))
    still, first = AXES[axis], next(iter(found.values()))[0]
    title = f"{size}: ms a step over {NAMES[axis]}, {NAMES[still]} {first['shape'][still]:,}, {first['gpu']}"
    area = (left + LEFT, top + TOP, left + WIDTH - RIGHT, top + HEIGHT - BOTTOM)
    right = end_of_axis(max(x for line in lines for x, _ in line.points))
    draw_panel(canvas, area, title, lines, right, (0, end_of_axis(max(y for line in lines for _, y in line.points))))
    for i, (text, colour) in enumerate(legend):
        canvas.text((area[0] + 10, area[1] + 8 + 14 * i), text, fill=colour)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+", help="files of JSON lines")
    parser.add_argument("-o", "--out", type=Path, help="growth.png beside the first file, unless told otherwise")
    asked = parser.parse_args()
    try:
        records = measured(asked.records)
        draw(records, asked.out or asked.records[0].with_name("growth.png"))
    except TurbowanError as error:
        print(f"growth: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
