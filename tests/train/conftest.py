"""What the training tests share: a clock that counts steps, and settings small enough for seconds on a CPU."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the code widens to float32 (norms, rotations, time, head, a network's inputs) it widens to float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture
def tiny() -> Path:
    """The embedded model's folder."""
    return Path(turbowan.__file__).parent / "assets" / "tiny"


@pytest.fixture
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script as two processes under torchrun, with the arguments given; returns how that ended."""

    def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        root = str(Path(turbowan.__file__).parent.parent)
        return subprocess.run(
            [*launcher, str(script), *arguments], capture_output=True, text=True, check=False, timeout=240,
            env={"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        )  # fmt: skip

    return run


@pytest.fixture
def small_run() -> SimpleNamespace:
    """The names of `small_run.py`, and its path as `script`."""
    script = Path(__file__).with_name("small_run.py")
    torch.set_num_threads(1)
    return SimpleNamespace(**runpy.run_path(str(script)), script=script)
