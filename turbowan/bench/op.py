"""Times the cases of `bench/op_<what>.py` on a GPU with a cold cache: median, spread, share of what bounds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from ..errors import RequestError
from .case import Case
from .pipeline import machine_facts

OPERATIONS = ("attention", "linear", "norm", "rope")
SHAPES = ("1.3B-480p", "14B-480p", "14B-720p")
# measured on one H200 with random numbers: the best large products, and a copy (bytes read and written)
PEAKS = {"bf16": 813e12, "int8": 1624e12, "fp8": 1505e12}
COPY = 4.27e12
_L2_BYTES = 256 << 20


def run_operation(what: str, shape: str, repeats: int = 20) -> Iterator[dict[str, Any]]:
    """One record per case.

    Args:
        what: one of OPERATIONS. shape: one of SHAPES. repeats: timed calls, after three for warm-up.

    Raises:
        RequestError: unknown name, or no GPU.
    """
    cases: Callable[[str], Iterator[Case]] = operation_module(what, shape).cases
    with torch.inference_mode():
        for case in cases(shape):
            yield {"bench": f"op {what}", "case": f"{shape} {case.name}", **time_case(case, repeats)}


def operation_module(what: str, shape: str) -> ModuleType:
    """`bench/op_<what>.py`, the random numbers seeded for it.

    Raises:
        RequestError: unknown name, or no GPU.
    """
    if what not in OPERATIONS or shape not in SHAPES:
        names = f"{', '.join(OPERATIONS)} on {', '.join(SHAPES)}"
        raise RequestError(f"bench op knows {names}; got '{what}' on '{shape}'")
    if not torch.cuda.is_available():
        raise RequestError("bench op needs a CUDA device; there is none here")
    torch.manual_seed(0)
    return import_module(f".op_{what}", __package__)


def time_case(case: Case, repeats: int) -> dict[str, Any]:
    """Times, rate, share of the bound and peak memory of one case; what failed in a line if it cannot run or, beside
    its times, if its error cannot be found."""
    device = torch.device("cuda", torch.cuda.current_device())
    record: dict[str, Any] = {**machine_facts(device), "shape": case.shape}
    torch.cuda.reset_peak_memory_stats()
    try:
        times = time_calls(case.run, repeats)
    except Exception as error:  # a variant that does not compile here must not end the others
        return record | {"failed": _in_a_line(error)}
    p20, p50, p80 = (round(times[int(share * (len(times) - 1))], 4) for share in (0.2, 0.5, 0.8))
    seconds = p50 / 1e3
    bound = max(case.flops / PEAKS[case.peak], case.bytes / COPY)
    record |= {
        "ms": {"p20": p20, "p50": p50, "p80": p80},
        "tflops": round(case.flops / seconds / 1e12, 1),
        "gbytes_per_s": round(case.bytes / seconds / 1e9, 1),
        "share_of_bound": round(bound / seconds, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }
    try:
        return record | ({"error": case.error()} if case.error else {})
    except Exception as error:  # the eager twin may need more memory than there is
        return record | {"failed": f"its error: {_in_a_line(error)}"}


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def time_calls(run: Callable[[], Any], repeats: int) -> list[float]:
    """Sorted milliseconds of single calls, each after the cache was overwritten."""
    flush = torch.empty(_L2_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in marks:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in marks)
