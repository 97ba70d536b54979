"""What the distillation stages train on: batches by step, the same whichever process asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One process's rows of a step's batch, on its device.

    latents: float32 [B, 16, T, h, w], normalised. text: [B, L, D]; its last row stands for all up to the 512th.
    condition: [B, 20, T, h, w] for image-to-video, else None.
    """

    latents: Tensor
    text: Tensor
    condition: Tensor | None = None

    def __len__(self) -> int:
        return self.latents.shape[0]


class Source(Protocol):
    """Where batches come from; what `batch` gives depends on the step alone, so a resumed run misses nothing."""

    @property
    def negative(self) -> Tensor:
        """[1, L, D]: the text of the unconditional branch."""
        ...

    @property
    def text_dim(self) -> int:
        """Width of the texts."""
        ...

    @property
    def condition_channels(self) -> int:
        """20 with image conditions, 0 without."""
        ...

    def batch(self, step: int, rows: range) -> Batch:
        """The given rows of the step's global batch."""
        ...


class Draws:
    """Random numbers of one step: each row of the global batch has its own stream, whichever process holds it.

    Args:
        seed, step: of the run.
        rows: which rows of the global batch are drawn for.
        device: where; the numbers are those of the device's own generator.
    """

    def __init__(self, seed: int, step: int, rows: range, device: torch.device) -> None:
        self.device = device
        self._streams = [torch.Generator(device).manual_seed(stream(seed, step, row)) for row in rows]

    def __len__(self) -> int:
        return len(self._streams)

    def normal(self, *shape: int) -> Tensor:
        """float32 [B, *shape], standard normal."""
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self._streams])

    def uniform(self) -> Tensor:
        """float32 [B] in 0..1."""
        return torch.stack([torch.rand((), generator=g, device=self.device) for g in self._streams])


def stream(seed: int, step: int, row: int) -> int:
    """The generator's seed, 63 bits, for a row of a step of a run.

    A CPU's generator takes only the low 32. They are a permutation of 4,096 step + row, picked by the run's seed: no
    two rows of the first 2^20 steps share them, where a plain hash would give two of 100,000 rows the same. The high
    ones are a hash of all three.
    """
    low = (4096 * step + row) % 2**32
    for key in np.random.SeedSequence(seed).generate_state(2).tolist():
        low ^= key
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):  # Wellons' "lowbias32": every step inverts
            low = (low ^ low >> shift) * factor % 2**32
    high = int(np.random.SeedSequence((seed, step, row)).generate_state(1)[0])
    return (high >> 1) << 32 | low
