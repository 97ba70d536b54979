"""The request closest to one that does not fit, found by trying."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ..request import GenerateRequest
from ..specs import FRAME_STEP, RESOLUTIONS

Fits = Callable[[GenerateRequest], bool]
SHORTER = (1.0, 0.8, 0.6, 0.4, 0.2)  # of the frames


def nearest(request: GenerateRequest, width: int, height: int, frames: int, fits: Fits) -> str | None:
    """What to ask for instead, as a part of a sentence; None where nothing fits.

    Least is lost first: another memory mode, then 8-bit linear layers, then as many pixels in all as can be had.

    Args:
        width, height, frames: what the request comes to. fits: whether a plan can be made for a request.
    """
    volume = width * height * frames
    options = sorted(_sizes(width, height, frames), key=lambda size: volume - size[0] * size[1] * size[2])
    for w, h, count in options:
        for other in _ways(request):
            changed = replace(
                other, width=w, height=h, num_frames=count, resolution=None, aspect_ratio="16:9",
                adaptive_resolution=False,
            )  # fmt: skip
            if fits(changed):
                return f"{w}x{h}, {count} frame{'s' if count > 1 else ''} fits" + _flags(request, other)
    return None


def _ways(request: GenerateRequest) -> Iterator[GenerateRequest]:
    """The request in other modes and precisions; one sample at last."""
    for samples in dict.fromkeys((request.num_samples, 1)):
        for precision in dict.fromkeys((request.precision, "int8")):
            for memory in dict.fromkeys((request.memory, "auto", "minimal")):
                yield replace(request, num_samples=samples, precision=precision, memory=memory)


def _flags(request: GenerateRequest, other: GenerateRequest) -> str:
    names = ("precision", "memory", "num_samples")
    changed = [name for name in names if getattr(request, name) != getattr(other, name)]
    flags = [f"--{name.replace('_', '-')} {getattr(other, name)}" for name in changed]
    return f" with {' '.join(flags)}" if flags else ""


def _sizes(width: int, height: int, frames: int) -> Iterator[tuple[int, int, int]]:
    """The given size and the smaller ones of about its shape, each with the given frames and with fewer."""
    known = {
        size for table in RESOLUTIONS.values() for size in table.values()
        if size[0] * size[1] < width * height and abs(size[0] / size[1] - width / height) < 0.15 * width / height
    }  # fmt: skip
    for w, h in ((width, height), *known):
        for share in SHORTER:
            yield w, h, max(1, int(frames * share - 1) // FRAME_STEP * FRAME_STEP + 1)
