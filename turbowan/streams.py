"""CUDA streams beside the current one."""

from __future__ import annotations

from threading import Lock

import torch

_lock, _streams = Lock(), dict[tuple[int, str], torch.cuda.Stream]()


def side_stream(device: torch.device, work: str) -> torch.cuda.Stream:
    """The stream of a kind of work ("load", say) on a GPU, always the same one.

    PyTorch hands out 32 in turn, each of which takes host memory when first used, and gives what was used on one only
    to that one again.

    Args:
        device: without an index, the current one.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with _lock:
        if (index, work) not in _streams:
            _streams[index, work] = torch.cuda.Stream(index)
        return _streams[index, work]
