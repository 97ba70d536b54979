"""Page-locked host memory of exactly the size that is needed: PyTorch's own rounds each tensor to a power of two."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

from .lending import laid_out, together_bytes

_PAGE = 4096


class Locked:
    """Copies of tensors, next to each other in memory from which a GPU copies by itself. Unlocked when the object goes.

    Args:
        device: the GPU.

    Raises:
        RuntimeError: the machine does not lock so much.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        size = -(-together_bytes(tensors) // _PAGE) * _PAGE  # whole pages, which no other memory shares
        memory = whole_pages(size)
        with torch.cuda.device(device):  # else a context is made on the first GPU
            code = int(_runtime().cudaHostRegister(memory.data_ptr(), size, 0))
            if code != 0:
                _forget_error()
                raise RuntimeError(f"cudaHostRegister of {size:,} bytes gave error {code}")
        finalize(self, _unlock, memory, device).atexit = False
        self.tensors = laid_out(memory, tensors)
        for target, tensor in zip(self.tensors, tensors, strict=True):
            target.copy_(tensor.detach())


def whole_pages(size: int) -> Tensor:
    """Zeros, uint8 [size], from the start of a page on, for a size of whole pages.

    In large pages where Linux has them, and written to by all cores: whoever locks pages that were never used takes
    them from the system one by one, which is six times as slow.

    Raises:
        RuntimeError: there is not so much memory.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise RuntimeError(f"no {size:,} bytes of host memory: {error.strerror}") from error
        with suppress(OSError):  # a system without large pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(mapped, dtype=torch.uint8).zero_()
    memory = torch.empty(size + _PAGE, dtype=torch.uint8)
    return memory[-memory.data_ptr() % _PAGE :][:size].zero_()


def _unlock(memory: Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # copies from it may be under way
    with torch.cuda.device(device):
        _runtime().cudaHostUnregister(memory.data_ptr())


def _runtime() -> Any:
    return torch.cuda.cudart()


def _forget_error() -> None:
    """CUDA keeps an error until somebody asks, and the next kernel would be blamed for it."""
    try:
        torch.zeros(1, device="cuda").add_(1)
    except RuntimeError:
        return
