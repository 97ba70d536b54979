"""How much of a frame the VAE works on at a time, so that it fits in memory: tiles that overlap by what layers see."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

# What the layers on the frame's side of the middle see beyond a position, in latent positions and rounded up. Decoding:
# 6 convolutions at 1/8 of the size and one after each doubling; 6 + (1 + 6) / 2 + ... + 1 / 8 for the last = 12.4
# at most. Encoding, towards the right, in pixels: 5 + 2 + 2 * 4 + 4 + 4 * 4 + 8 + 8 * 4 = 75.
DECODER_HALO = 13
ENCODER_HALO = 10
# What lives at once, in frames of full size and base width.
FULL = 64  # pixels of a latent position
DECODER_UNITS = 4.1  # for each frame of a chunk
# frames that layers remember, two each: 7 at full size, 6 and 6 + 1 and 6 + 1 at half the size with twice the channels
# (a half), a quarter (a quarter), an eighth (a sixteenth); and the two before a chunk in two layers' inputs
DECODER_PAST = 2 * (7 + 6 / 2 + 7 / 4 + 7 / 16) + 4
ENCODER_UNITS = 4.2
STEADY_FRAMES = 14  # of a clip that repeats its second frame: 2, 2 more after each of 5 convolutions, and 2 before
ENCODER_PAST = 2 * (5 + 4 / 2 + 4 / 4 + 4 / 16)


@dataclass(frozen=True)
class Span:
    """Of one axis: positions start to stop are worked on, of which keep_start to keep_stop are right."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int

    @property
    def read(self) -> slice:
        return slice(self.start, self.stop)

    def kept(self, scale: int = 1) -> slice:
        """Where it belongs in the whole."""
        return slice(scale * self.keep_start, scale * self.keep_stop)

    def crop(self, scale: int = 1) -> slice:
        """What to keep of a result."""
        return slice(scale * (self.keep_start - self.start), scale * (self.keep_stop - self.start))


@dataclass(frozen=True)
class Grid:
    """rows, columns: of tiles. latents: frames of a chunk."""

    rows: int
    columns: int
    latents: int

    @property
    def whole(self) -> bool:
        return self.rows == self.columns == 1

    def tiles(self, height: int, width: int, halo: int) -> Iterator[tuple[Span, Span]]:
        """Spans of rows and of columns of each tile."""
        return product(spans(height, self.rows, halo), spans(width, self.columns, halo))


def spans(length: int, count: int, halo: int) -> list[Span]:
    """An axis in `count` even parts, each with a halo inside the axis."""
    edges = [length * i // count for i in range(count + 1)]
    return [
        Span(max(0, start - halo), min(length, stop + halo), start, stop)
        for start, stop in pairwise(edges)
    ]


def work_bytes(positions: int, latents: int, per_frame: float, fixed: float) -> int:
    """What the layers at full size take on a tile of so many latent positions, so many latent frames at a time; the
    others are those of `choose`."""
    return math.ceil((fixed + latents * per_frame) * positions)


def choose(budget: int, height: int, width: int, halo: int, most: int, per_frame: float, fixed: float) -> Grid:
    """The largest chunk that fits whole; else, one latent frame at a time, the tiles with the least overlap.

    Args:
        budget: bytes. height, width: of the latent. most: latent frames of a chunk. per_frame: bytes per latent
            position for each latent frame of a chunk. fixed: bytes per latent position.

    Returns:
        The smallest tiles where none fit.
    """
    for latents in range(most, 0, -1):
        if work_bytes(height * width, latents, per_frame, fixed) <= budget:
            return Grid(1, 1, latents)

    rows, columns = (
        {count: _largest_and_sum(length, count, halo) for count in range(1, -(-length // 4) + 1)}
        for length in (height, width)
    )

    def cost(grid: Grid) -> tuple[bool, int]:
        """Not fitting is the worst, and then the largest tile; else the positions worked on in all."""
        (tallest, heights), (widest, widths) = rows[grid.rows], columns[grid.columns]
        fits = work_bytes(tallest * widest, 1, per_frame, fixed) <= budget
        return not fits, heights * widths if fits else tallest * widest

    return min((Grid(r, c, 1) for r, c in product(rows, columns)), key=cost)


def _largest_and_sum(length: int, count: int, halo: int) -> tuple[int, int]:
    """Of the lengths of an axis's spans."""
    lengths = [span.stop - span.start for span in spans(length, count, halo)]
    return max(lengths), sum(lengths)
