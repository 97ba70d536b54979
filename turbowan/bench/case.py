"""One thing to time, and how far its result is off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A call with what it costs at least.

    name: of the implementation and variant. run: no arguments, returns its outputs. shape: for the record.
    flops: multiply-adds times two. bytes: what must be read and written once. peak: which product rate bounds it
    ("bf16", "int8", "fp8"). error: relative error against the eager twin in float32, computed when asked for.
    """

    name: str
    run: Callable[[], Any]
    shape: dict[str, int | float] = field(default_factory=dict)
    flops: int = 0
    bytes: int = 0
    peak: str = "bf16"
    error: Callable[[], float] | None = None


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """|ours - expected| / |expected| in the 2-norm and in float32, to five digits."""
    ours, expected = ours.float(), expected.float()
    return round(float((ours - expected).norm() / expected.norm()), 5)
