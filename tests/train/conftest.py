"""What the training tests share: a clock that counts steps, and settings small enough for seconds on a CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import turbowan
from turbowan.train import loop


class Clock:
    """One second per look, and a stage looks once before each step: a stage of N seconds makes N - 1 steps anywhere."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Training by a clock of its own; stages log and save after every step."""
    clock = Clock()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=clock.monotonic))
    for stage in ("turbowan.train.vae", "turbowan.train.flow"):
        monkeypatch.setattr(f"{stage}.every", lambda _: lambda: True)
    return clock


@pytest.fixture
def tiny() -> Path:
    """The embedded model's folder."""
    return Path(turbowan.__file__).parent / "assets" / "tiny"
