"""What this machine is and has: interpreter, PyTorch, devices, memory, disk, packages."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import MachineError

REQUIRED = {  # the oldest versions that serve
    "torch": "2.7", "numpy": "1.26", "safetensors": "0.4.5", "transformers": "4.48", "sentencepiece": "0.2",
    "ftfy": "6.1", "huggingface_hub": "0.27", "av": "13", "pillow": "10", "typer": "0.12", "rich": "13",
}  # fmt: skip
TESTED = {"GPU": "2.11", "CPU": "2.13"}  # the PyTorch that our tests and measurements ran with
OPTIONAL = {"triton": "torch.compile and kernels on a GPU", "diffusers": "comparisons with its models in the tests"}


def torch_problem(version: str) -> str | None:
    """Why this PyTorch cannot be used, as a line that says what to do; None when it can.

    2.9 computes bfloat16 3-D convolutions, all of the VAE, without cuDNN: 4 to 20 times slower and in 3 to 17 times the
    memory, and wrongly with some cuDNN versions (pytorch issues 166643, 166122, 163539).
    """
    found = version_numbers(version)
    if found < version_numbers(REQUIRED["torch"]):
        return f"PyTorch {version} is too old; install torch >= {REQUIRED['torch']}"
    if found[:2] == (2, 9):
        return f"PyTorch {version} breaks the VAE (its bfloat16 conv3d); install torch >= 2.10, or 2.8"
    return None


def torch_note(version: str, on_gpu: bool) -> str | None:
    """A line where a PyTorch serves but none of our figures and tests were made with it; None where they were."""
    tested = TESTED["GPU" if on_gpu else "CPU"]
    if torch_problem(version) is not None or version_numbers(version)[:2] == version_numbers(tested):
        return None
    where = " and ".join(f"{release} (on a {place})" for place, release in TESTED.items())
    return f"PyTorch {version} is supported but not measured by us; tested: {where}"


def check_torch() -> None:
    """Raise MachineError where the installed PyTorch cannot be used."""
    import torch

    problem = torch_problem(torch.__version__)
    if problem is not None:
        raise MachineError(problem)


def package_versions() -> dict[str, str | None]:
    """Version of each required and optional package, None where it is missing."""
    return {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}


def package_problems(versions: dict[str, str | None]) -> list[str]:
    """A line for each required package that is missing or too old."""
    problems = []
    for name, oldest in REQUIRED.items():
        version = versions[name]
        if name == "torch" and version is not None:
            problem = torch_problem(version)
            problems += [problem] if problem else []
        elif version is None:
            problems.append(f"the package {name} is missing; run: pip install '{name}>={oldest}'")
        elif version_numbers(version) < version_numbers(oldest):
            problems.append(f"{name} {version} is too old; run: pip install '{name}>={oldest}'")
    return problems


def host() -> dict[str, object]:
    """Interpreter, platform, CPU threads, and bytes of memory in all and free (None where the system does not tell)."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpu_threads": threads,
        "memory": _windows_memory()[0] or _pages("SC_PHYS_PAGES"),
        "memory_free": free_memory(),
    }


def cuda_devices() -> list[dict[str, Any]]:
    """Name, compute capability [major, minor] and bytes of memory of each CUDA device that PyTorch sees."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        devices.append(
            {
                "name": torch.cuda.get_device_name(index),
                "capability": list(torch.cuda.get_device_capability(index)),
                "memory": total,
                "memory_free": free,
            }
        )
    return devices


def free_disk(path: Path) -> int:
    """Free bytes on the disk of a path, which need not exist yet."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def size_text(count: float) -> str:
    """Bytes for people: 28.6 GB, 4.5 MB, 812 bytes (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def version_numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0); 2.9.0a0+git -> (2, 9, 0)."""
    return tuple(int(n) for n in re.findall(r"\d+", re.match(r"[\d.]*", version).group()))  # type: ignore[union-attr]


def free_memory() -> int | None:
    """Bytes of memory still to be had; all there is where the system does not tell, None where it tells neither.

    Linux counts here what its file cache would give back: after a checkpoint has been read little else looks free. A
    container's limit counts, too.
    """
    with suppress(OSError, ValueError):
        found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return min([int(found[1]) * 1024, *left_in_container()])
    return _windows_memory()[1] or _pages("SC_AVPHYS_PAGES") or _pages("SC_PHYS_PAGES")


def left_in_container(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left of the limit that a control group sets; none where there is no limit.

    Args:
        root: where control groups (version 1 or 2) are mounted, as a container sees its own.
    """
    names = (
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),  # version 1
    )
    left = []
    for limit, used, details, prefix in names:
        with suppress(OSError, ValueError):  # "max" is no number
            files = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", (root / details).read_text(), re.MULTILINE)
            taken = int((root / used).read_text()) - sum(map(int, files))
            left.append(max(0, int((root / limit).read_text()) - taken))
    return left


def trim_heap() -> None:
    """Give the system what C's allocator keeps of memory that was freed, where there is a way to (glibc)."""
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def peak_host_memory() -> int:
    """The most bytes this process has held; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX."""

    _fields_ = (
        ("length", ctypes.c_uint32), ("load", ctypes.c_uint32), ("total", ctypes.c_uint64), ("free", ctypes.c_uint64),
        ("rest", ctypes.c_uint64 * 5),
    )  # fmt: skip


def _windows_memory() -> tuple[int | None, int | None]:
    """Bytes of memory that there are, and that are free; None where this is no Windows."""
    if sys.platform == "win32":
        status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
        if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
            return status.total, status.free
    return None, None


def _pages(name: str) -> int | None:
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
