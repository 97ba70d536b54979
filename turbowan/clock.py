"""How far a generation is and how long its stages took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

STAGES = ("text", "condition", "load", "denoise", "switch", "decode", "write", "total")


@dataclass(frozen=True)
class Progress:
    """Where a generation is: `done` of `total` within a stage ("text", "condition", "load", "denoise", "decode").

    unit: what is counted, where it is not pieces of the stage's own work: "bytes".
    """

    stage: str
    done: int
    total: int
    unit: str = ""


ProgressCallback = Callable[[Progress], None]


class Clock:
    """Seconds per stage. Stages nest: a part loaded while denoising counts as load, not as denoise.

    On a GPU both ends of a stage wait for it, so that no stage holds another one's work: stages are for whole pieces of
    work, not for steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._device = device
        self._inner = [0.0]  # seconds already given to stages inside the open ones

    @contextmanager
    def stage(self, name: str, exclusive: bool = True) -> Iterator[None]:
        self._wait()
        started = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            self._wait()
            elapsed = time.perf_counter() - started
            inside = self._inner.pop()
            self.seconds[name] += elapsed - inside if exclusive else elapsed
            self._inner[-1] += elapsed

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
