"""Segments of PyTorch's allocator that grow: between tensors that come and go, far less is lost than in fixed ones."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch

_PIECE = 1 << 25  # bytes
_lock, _open = Lock(), 0


def segments_grow(device: torch.device) -> bool:
    """Whether they can on this GPU: as the user set PyTorch up, else as `growing` does."""
    if torch.cuda.get_allocator_backend() != "native":
        return True  # CUDA's own allocator maps memory, too
    if user_settings():
        return "expandable_segments:True" in user_settings()
    if sys.platform != "linux" or "microsoft" in platform.release().lower() or torch.version.hip is not None:
        return False
    return _works(torch.cuda.current_device() if device.index is None else device.index)


def _ours() -> bool:
    """Whether it is left to us."""
    return torch.cuda.get_allocator_backend() == "native" and not user_settings()


def user_settings() -> str:
    """Of PyTorch's allocator, from the environment."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    return "".join(os.environ.get(name, "") for name in names)


@contextmanager
def growing(device: torch.device) -> Iterator[None]:
    """New segments grow for as long as this is open, in the whole process; nothing changes where they cannot or where
    the user set PyTorch up."""
    if not _ours() or not segments_grow(device):
        yield
        return
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    """Requests may overlap: the last to end turns it off."""
    global _open
    with _lock:
        _open += change
        if (_open, change) in ((1, 1), (0, -1)):
            _set(change == 1)


@cache
def _works(index: int) -> bool:
    """Tried once, with a piece that fits between no others: drivers of shared GPUs lack it, and tell only then."""
    torch.cuda.empty_cache()
    unused = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    _count(1)
    try:
        torch.empty(unused + _PIECE, dtype=torch.uint8, device=f"cuda:{index}")
    except torch.OutOfMemoryError:
        return True  # the card is full; a driver that cannot gives another error
    except RuntimeError:
        return False
    finally:
        _count(-1)
        torch.cuda.empty_cache()
    return True


def _set(on: bool) -> None:
    if hasattr(torch._C, "_accelerator_setAllocatorSettings"):  # from PyTorch 2.10 on
        torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{on}")
    else:
        torch.cuda.memory._set_allocator_settings(f"expandable_segments:{on}")
