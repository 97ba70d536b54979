"""Shares, differences, ratios and means with their uncertainty: 95 % intervals throughout."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959964
Values = Sequence[float | None]
Found = dict[str, float | None]


def share(right: int, total: int) -> dict[str, float]:
    """A share with its interval (Wilson 1927), in 0..1: {"share", "low", "high", "right", "total"}."""
    if total == 0:
        return {"share": 0.0, "low": 0.0, "high": 1.0, "right": 0, "total": 0}
    p = right / total
    centre = (p + Z * Z / (2 * total)) / (1 + Z * Z / total)
    half = Z / (1 + Z * Z / total) * math.sqrt(p * (1 - p) / total + Z * Z / (4 * total * total))
    return {
        "share": p,
        "low": max(0.0, min(p, centre - half)),  # rounding must not put 0 of 9 below its own interval
        "high": min(1.0, max(p, centre + half)),
        "right": right,
        "total": total,
    }


def difference(ours: Sequence[bool], theirs: Sequence[bool]) -> dict[str, float]:
    """How much more often one side is right than the other on the same items.

    Source: Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired
    data" (Statistics in Medicine 17, 1998), method 10: both sides' Wilson intervals, joined with their correlation.

    Args:
        ours, theirs: whether each item is right, in the same order.

    Returns:
        points: share of ours less that of theirs, in percentage points, with low and high. b: items that only ours has
        right; c: only theirs; total.
    """
    pairs = list(zip(ours, theirs, strict=True))
    n = len(pairs)
    if n == 0:
        return {"points": 0.0, "low": -100.0, "high": 100.0, "b": 0, "c": 0, "total": 0}
    a, b, c = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True)))
    d = n - a - b - c
    one, other = share(a + b, n), share(a + c, n)
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    excess = float(a * d - b * c)
    if excess > 0:
        excess = max(excess - n / 2, 0.0)
    phi = excess / math.sqrt(margins) if margins else 0.0

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    delta = one["share"] - other["share"]
    low = delta - reach(one["share"] - one["low"], other["high"] - other["share"])
    high = delta + reach(one["high"] - one["share"], other["share"] - other["low"])
    return {"points": 100 * delta, "low": 100 * low, "high": 100 * high, "b": b, "c": c, "total": n}


def mean(values: Values) -> Found | None:
    """The mean of what is known, with its normal interval: {"mean", "low", "high", "total"}; None where nothing is.

    One value alone tells nothing of its spread: low and high are None.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    n = len(known)
    centre = math.fsum(known) / n
    return {"mean": centre, **_around(centre, [value - centre for value in known]), "total": n}


def ratio(ours: Values, theirs: Values) -> Found | None:
    """The mean of ours over the mean of theirs, on the items that both know.

    The interval is that of the ratio estimator (Cochran, "Sampling Techniques", 1977, section 6.4): the standard error
    of our - ratio * their, over the mean of theirs.

    Returns:
        {"ratio", "low", "high", "total"}; None where no item is known on both sides, or theirs are all 0. Of one item,
        low and high are None.
    """
    pairs = [(x, y) for x, y in zip(ours, theirs, strict=True) if x is not None and y is not None]
    below = math.fsum(y for _, y in pairs)
    if below <= 0:
        return None
    n = len(pairs)
    value = math.fsum(x for x, _ in pairs) / below
    return {"ratio": value, **_around(value, [(x - value * y) / (below / n) for x, y in pairs]), "total": n}


def _around(value: float, deviations: Sequence[float]) -> Found:
    """The normal interval of a mean, from the items' deviations from it."""
    n = len(deviations)
    if n == 1:
        return {"low": None, "high": None}
    half = Z * math.sqrt(math.fsum(x * x for x in deviations) / (n * (n - 1)))
    return {"low": value - half, "high": value + half}
