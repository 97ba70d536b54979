"""How much memory there is, and a cap on what PyTorch may take of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from ..machine import free_memory
from ..request import parse_bytes
from .segments import growing, segments_grow

CONTEXT = 9 * 10**8  # bytes of a GPU that a process takes besides PyTorch's: driver, kernels (0.80-0.87 GB on an H200)
MARGIN, MARGIN_SHARE = 3 * 10**8, 0.04  # left over: scratch of convolutions, loaded kernels
# What PyTorch's allocator holds at most over what lives at once, where its segments grow and where they do not: tensors
# of several sizes come and go, and what is left between them is lost. Estimates. Within budgets on an H200 growing ones
# held 1.01 to 1.10 times what lived, weights included (docs/memory.md).
GROWING, FIXED = {"denoise": 1.07, "decode": 1.15}, {"denoise": 1.45, "decode": 1.5}
HOST_MARGIN, HOST_SHARE = 10**9, 0.9  # of the host's free memory this much may hold weights, less a margin
PINNED_SHARE = 0.7  # of the host's free memory, at most, is locked
UNKNOWN_HOST = 8 * 10**9  # bytes that a host is taken to have when it does not tell


@dataclass(frozen=True)
class Room:
    """gpu: bytes that PyTorch could take on the device, ours included (of the host, for a CPU engine). host: bytes
    that the host has free, ours included. budget: bytes, over the whole process. name: of the device. grows: whether
    segments of its allocator can grow.
    """

    gpu: int
    host: int
    name: str = "cuda"
    budget: int | None = None
    grows: bool = True

    @property
    def on_gpu(self) -> bool:
        return not self.name.startswith("cpu")

    @property
    def limited(self) -> bool:
        """Whether the budget is what limits."""
        return self.budget is not None and self.limit == self.cap

    @property
    def cap(self) -> int | None:
        """What PyTorch may take within the budget."""
        return None if self.budget is None else max(0, self.budget - (CONTEXT if self.on_gpu else 0))

    @property
    def limit(self) -> int:
        return self.gpu if self.cap is None else min(self.gpu, self.cap)

    @property
    def usable(self) -> int:
        """What a plan may fill."""
        return max(0, int(self.limit * (1 - MARGIN_SHARE)) - MARGIN)

    @property
    def usable_host(self) -> int:
        """For weights."""
        return max(0, int(self.host * HOST_SHARE) - HOST_MARGIN)

    def spread(self, stage: str) -> float:
        """What the allocator holds in a stage ("denoise" or "decode") over what lives at once: a factor."""
        return (GROWING if self.grows else FIXED)[stage] if self.on_gpu else 1.0

    @property
    def place(self) -> str:
        return "in the budget" if self.limited else f"free on {self.name}"


def find_room(device: torch.device, budget: int | str | None = None, resident: int = 0, hosted: int = 0) -> Room:
    """Of this machine, now.

    Args:
        resident, hosted: bytes of our weights on the device and (of a GPU engine) on the host, which can be given up.
    """
    cap = None if budget is None else parse_bytes(budget)
    host = (free_memory() or UNKNOWN_HOST) + hosted
    if device.type != "cuda":
        return Room(host + resident, host + resident, str(device), cap)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = int(torch.cuda.mem_get_info(device)[0]) + unused + resident
    return Room(free, host, str(device), cap, segments_grow(device))


@contextmanager
def capped(device: torch.device, cap: int | None, tight: bool = False) -> Iterator[None]:
    """For as long as this is open, PyTorch takes no more than so many bytes of a GPU; None and a CPU: no cap.

    Args:
        tight: its allocator is to waste nothing, see `growing`.
    """
    if device.type != "cuda":
        yield
        return
    with growing(device) if tight else nullcontext():
        if cap is None:
            yield
            return
        index = torch.cuda.current_device() if device.index is None else device.index  # which these two ask for
        total = torch.cuda.get_device_properties(index).total_memory
        before = torch.cuda.get_per_process_memory_fraction(index) if _can_tell() else 1.0
        if torch.cuda.memory_reserved(index) > cap:
            torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(before, cap / total), index)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, index)


def _can_tell() -> bool:
    return hasattr(torch.cuda, "get_per_process_memory_fraction")  # from PyTorch 2.8 on
