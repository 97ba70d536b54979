"""The noise a generation starts from and adds: one generator, one draw after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw(shape: Sequence[int], count: int, seed: int, device: str | torch.device = "cpu") -> list[Tensor]:
    """`count` standard normal float32 tensors from one generator on `device`, as the official code draws them.

    Args:
        seed: 0..2^64-1. device: the same seed gives other numbers on "cpu" than on "cuda".
    """
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(tuple(shape), generator=generator, device=device) for _ in range(count)]
