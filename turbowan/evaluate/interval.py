"""Shares with their uncertainty."""

from __future__ import annotations

import math


def share(right: int, total: int) -> dict[str, float]:
    """A share with its 95 % interval (Wilson 1927), in 0..1: {"share", "low", "high", "right", "total"}."""
    if total == 0:
        return {"share": 0.0, "low": 0.0, "high": 1.0, "right": 0, "total": 0}
    z, p = 1.959964, right / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return {
        "share": p,
        "low": max(0.0, min(p, centre - half)),  # rounding must not put 0 of 9 below its own interval
        "high": min(1.0, max(p, centre + half)),
        "right": right,
        "total": total,
    }
