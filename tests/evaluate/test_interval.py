"""Intervals against values worked out elsewhere, at their ends, and against how often they hold."""

from __future__ import annotations

import random
from itertools import product

import pytest

from turbowan.evaluate.interval import difference, mean, ratio, share


def marks(a: int, b: int, c: int, d: int) -> tuple[list[bool], list[bool]]:
    """Items right on both sides, only ours, only theirs, neither."""
    return [True] * (a + b) + [False] * (c + d), [True] * a + [False] * b + [True] * c + [False] * d


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (500, 1000, 0.4691, 0.5309)],
)
def test_known_values(right: int, total: int, low: float, high: float) -> None:
    found = share(right, total)
    assert (found["share"], found["right"], found["total"]) == (right / total, right, total)
    assert found["low"] == pytest.approx(low, abs=1e-4)
    assert found["high"] == pytest.approx(high, abs=1e-4)


def test_of_nothing_nothing_is_known() -> None:
    assert share(0, 0) == {"share": 0.0, "low": 0.0, "high": 1.0, "right": 0, "total": 0}
    assert difference([], []) == {"points": 0.0, "low": -100.0, "high": 100.0, "b": 0, "c": 0, "total": 0}
    assert mean([None, None]) is None
    assert ratio([1.0, None], [None, 2.0]) is None
    assert ratio([1.0], [0.0]) is None


def test_one_item_has_no_interval() -> None:
    assert mean([None, 3.0]) == {"mean": 3.0, "low": None, "high": None, "total": 1}
    assert ratio([1.0, 2.0], [4.0, None]) == {"ratio": 0.25, "low": None, "high": None, "total": 1}


def test_a_share_lies_within_its_interval() -> None:
    for total in range(1, 60):
        for right in range(total + 1):
            found = share(right, total)
            assert 0 <= found["low"] <= found["share"] <= found["high"] <= 1
            assert found["low"] < found["high"]
            other = share(total - right, total)
            assert found["low"] == pytest.approx(1 - other["high"], abs=1e-12)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), 5.69, 34.04),  # Newcombe 1998, table II
        ((14, 5, 0, 22), 1.15, 22.65),  # Altman and others, "Statistics with Confidence", 2000, table 6.2
        ((1, 1, 7, 12), -50.7, -2.6),  # Fagerland, Lydersen and Laake 2014: before and after a transplantation
    ],
)
def test_published_differences(table: tuple[int, int, int, int], low: float, high: float) -> None:
    a, b, c, d = table
    found = difference(*marks(*table))
    assert (found["b"], found["c"], found["total"]) == (b, c, a + b + c + d)
    assert found["points"] == pytest.approx(100 * (b - c) / (a + b + c + d))
    assert found["low"] == pytest.approx(low, abs=0.06)
    assert found["high"] == pytest.approx(high, abs=0.06)


def test_a_difference_turns_with_its_sides_and_stays_in_range() -> None:
    for table in product(range(4), repeat=4):
        if not sum(table):
            continue
        ours, theirs = marks(*table)
        found, turned = difference(ours, theirs), difference(theirs, ours)
        assert -100 <= found["low"] <= found["points"] <= found["high"] <= 100
        assert found["low"] < found["high"]
        assert (found["low"], found["high"]) == pytest.approx((-turned["high"], -turned["low"]), abs=1e-9)


def test_the_intervals_hold_as_often_as_they_say(fresh_seed: int) -> None:
    """400 experiments of 200 paired items each, sides that agree more often than not; 95 % gives 380."""
    rng = random.Random(fresh_seed)
    held = {"difference": 0, "ratio": 0, "mean": 0}
    for _ in range(400):
        hard = [rng.random() < 0.2 for _ in range(200)]
        ours, theirs = ([rng.random() < (0.3 if h else 0.95) for h in hard] for _ in range(2))
        ours = [mark and rng.random() < 0.9 for mark in ours]
        truth = 100 * -0.1 * (0.2 * 0.3 + 0.8 * 0.95)
        found = difference(ours, theirs)
        held["difference"] += found["low"] <= truth <= found["high"]
        base = [rng.uniform(0.2, 1.0) for _ in range(200)]
        shrunk = [0.9 * value + rng.gauss(0, 0.1) for value in base]
        slower = ratio(shrunk, base)
        assert slower is not None
        held["ratio"] += slower["low"] <= 0.9 <= slower["high"]
        average = mean(base)
        assert average is not None
        held["mean"] += average["low"] <= 0.6 <= average["high"]
    assert min(held.values()) >= 360, held  # four and a half standard deviations below 380
    assert max(held.values()) < 400, held


def test_a_ratio_pairs_what_both_know() -> None:
    found = ratio([1.0, None, 3.0, 5.0], [2.0, 100.0, 6.0, None])
    assert found == {"ratio": 0.5, "low": 0.5, "high": 0.5, "total": 2}


def test_a_mean_is_of_what_is_known() -> None:
    found = mean([1.0, None, 3.0])
    assert found == pytest.approx({"mean": 2.0, "low": 2 - 1.96, "high": 2 + 1.96, "total": 2}, abs=1e-3)
