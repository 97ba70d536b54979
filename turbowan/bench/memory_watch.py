"""How much memory a GPU and this process hold while something runs, by the device's and the system's own figures."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

INTERVAL = 0.01  # seconds between two looks


class MemoryWatch:
    """The most bytes a device held since the last look back, whoever holds them.

    Made before CUDA is started, it knows the idle value and counts the CUDA context, where NVIDIA's management library
    can be asked; else (`source` says so) the process's own view serves, which starts after the context.

    Args:
        device: what is watched; nothing is on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.source = "none"
        self._read: Callable[[], int] | None = None
        if device.type == "cuda":
            self._read = _management_reader(device.index or 0)
            self.source = "NVML" if self._read else "cudaMemGetInfo, without the context"
            self._read = self._read or (lambda: _used(device))
        self.idle = self._peak = self._read() if self._read else 0
        self._stop = threading.Event()
        if self._read:
            threading.Thread(target=self._watch, daemon=True).start()

    def peak(self) -> int:
        """Bytes beyond the idle value, and from here on anew."""
        if self._read is None:
            return 0
        now = self._read()
        peak, self._peak = max(self._peak, now), now
        return peak - self.idle

    def close(self) -> None:
        self._stop.set()

    def _watch(self) -> None:
        assert self._read is not None
        while not self._stop.wait(INTERVAL):
            self._peak = max(self._peak, self._read())


def _used(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _management_reader(index: int) -> Callable[[], int] | None:
    """Reads the bytes in use on the process's CUDA device of this index; None where the library cannot be asked."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    name = visible[index].strip() if index < len(visible) and visible[index].strip() else str(index)
    handle, memory = ctypes.c_void_p(), _Memory()
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if library.nvmlInit_v2() != 0:
            return None
        if name.isdigit():
            failed = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), ctypes.byref(handle))
        else:
            failed = library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
    except (OSError, AttributeError):
        return None

    def read() -> int:
        library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        return int(memory.used)

    return None if failed or not read() else read


def host_memory() -> dict[str, int]:
    """Bytes this process holds now: all of it, of that its own (no file's pages), and what PyTorch has pinned.

    Empty where the system does not tell.
    """
    found: dict[str, int] = {}
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        for name, key in (("VmRSS", "all"), ("RssAnon", "own")):
            line = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
            if line:
                found[key] = int(line[1]) * 1024
    statistics = getattr(torch.cuda, "host_memory_stats", None)
    if statistics is not None and torch.cuda.is_initialized():
        with suppress(RuntimeError, KeyError):
            found["pinned"] = int(statistics()["allocated_bytes.current"])
    return found
