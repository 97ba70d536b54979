"""Wilson's interval against values worked out elsewhere, and at its ends."""

from __future__ import annotations

import pytest

from turbowan.evaluate.interval import share


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


def test_a_share_lies_within_its_interval() -> None:
    for total in range(1, 60):
        for right in range(total + 1):
            found = share(right, total)
            assert 0 <= found["low"] <= found["share"] <= found["high"] <= 1
            assert found["low"] < found["high"]
            other = share(total - right, total)
            assert found["low"] == pytest.approx(1 - other["high"], abs=1e-12)
