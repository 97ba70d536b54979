"""Which of two experts a step belongs to (Wan 2.2)."""

from __future__ import annotations

from collections.abc import Sequence


def expert_for(t: float, boundary: float) -> str:
    """ "high" (high noise) where t >= boundary, else "low".

    Args:
        t: time in 0..1 (noise share), unrounded.
        boundary: switch point in 0..1, 0.9 for Wan 2.2 image-to-video.
    """
    return "high" if t >= boundary else "low"


def switch_step(times: Sequence[float], boundary: float) -> int:
    """How many steps of a falling grid (its end 0 included) the high-noise expert takes before the other goes on."""
    return sum(expert_for(t, boundary) == "high" for t in times[:-1])
