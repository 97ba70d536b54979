"""What the stages counted in minutes share: a time budget, a schedule over it, a state that survives a kill."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.files import make_folder, replacing
from ..errors import CheckpointError
from . import curve
from .distributed import average_gradients, from_rank_0, rank, world_size
from .ema import Average

STATE_FILE = "state.pt"


@dataclass(frozen=True)
class Schedule:
    """Learning rate over a stage's share of done work: linear warm-up, then cosine to `final` of the peak."""

    peak: float
    warmup: float = 0.02
    final: float = 0.02

    def at(self, progress: float) -> float:
        if progress < self.warmup:
            return self.peak * max(progress, 1e-3) / self.warmup
        done = (progress - self.warmup) / (1 - self.warmup)
        return self.peak * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


class Stage:
    """A resumable stage measured in minutes: the same folder goes on where the last run stopped.

    Args:
        folder: where state and curve are kept.
        minutes: the whole stage's length in minutes of one GPU; N processes take an Nth of it.
        max_minutes: how long this run may take; the stage goes on in the next one.
        parts: everything with `state_dict` and `load_state_dict`, or an `Average`, by name.
        device: of this process.
    """

    CLOCK_STEPS = 16  # processes agree on the time so often

    def __init__(
        self, folder: Path, minutes: float, max_minutes: float | None, parts: dict[str, Any], device: torch.device
    ) -> None:
        self.folder, self.parts, self.device = folder, parts, device
        self.seconds = 60 * minutes / world_size()
        self.limit = 60 * max_minutes if max_minutes is not None else math.inf
        self.trained, self.step = 0.0, 0
        make_folder(folder)
        if (folder / STATE_FILE).exists():
            self._resume()
        self.started = time.monotonic()
        self.before = self.trained

    @property
    def progress(self) -> float:
        return min(1.0, self.trained / self.seconds)

    @property
    def running(self) -> bool:
        """Whether another step fits both the stage and this run. Also advances the clock."""
        if world_size() == 1 or self.step % self.CLOCK_STEPS == 0:
            self.trained = self.before + from_rank_0(time.monotonic() - self.started, self.device)
        return self.trained < self.seconds and self.trained - self.before < self.limit

    def save(self) -> None:
        """Write the state beside the old one, then rename: a kill at any moment leaves one whole state."""
        if rank() != 0:
            return
        state: dict[str, Any] = {"trained": self.trained, "step": self.step}
        for name, part in self.parts.items():
            state[name] = part.values if isinstance(part, Average) else part.state_dict()
        with replacing(self.folder / STATE_FILE) as partial:
            torch.save(state, partial)

    def _resume(self) -> None:
        try:
            state = torch.load(self.folder / STATE_FILE, map_location="cpu", weights_only=True)
            self.trained, self.step = state["trained"], state["step"]
            for name, part in self.parts.items():
                if isinstance(part, Average):
                    for mine, kept in zip(part.values, state[name], strict=True):
                        mine.copy_(kept)
                else:
                    part.load_state_dict(state[name])
        except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:160]
            raise CheckpointError(
                f"{self.folder / STATE_FILE} is not a state of this stage ({reason}); give another --out"
            ) from error

    def log(self, **values: float) -> None:
        """Append one line to the curve and print it; minutes are those of this stage's clock."""
        if rank() == 0:
            line = {"step": self.step, "minutes": round(self.trained / 60, 3), **values}
            curve.log(self.folder / curve.CURVE_FILE, line)


def clip_and_step(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[Tensor], lr: float, max_norm: float
) -> Tensor:
    """Average the gradients over processes, clip their norm, step. Returns the norm before clipping."""
    average_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def every(seconds: float) -> Callable[[], bool]:
    """A test that is true at most once in so many seconds."""
    last = time.monotonic()

    def due() -> bool:
        nonlocal last
        if time.monotonic() - last < seconds:
            return False
        last = time.monotonic()
        return True

    return due
