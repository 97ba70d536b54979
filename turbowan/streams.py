"""CUDA streams beside the current one."""

from __future__ import annotations

from functools import cache

import torch


@cache
def side_stream(device: torch.device, work: str) -> torch.cuda.Stream:
    """The stream of a kind of work ("load", say) on a GPU, always the same one.

    PyTorch hands out 32 in turn, each of which takes host memory when first used, and gives what was used on one only
    to that one again.
    """
    return torch.cuda.Stream(device)
