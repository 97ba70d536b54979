"""What a call asks of the host: time to enqueue it, memory, waiting; and the same call as a CUDA graph."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .op import time_calls

_PACKAGE = Path(__file__).parents[1]
_failed: list[torch.cuda.CUDAGraph] = []  # PyTorch's allocator may go on asking a graph whose capture broke off


def host_facts(run: Callable[[], Any], repeats: int = 5) -> dict[str, Any]:
    """Of a call that ran before, so that its kernels are compiled.

    Returns:
        host_ms: median time from call to return, the GPU idle at the start. A host that is about a thousand launches
            ahead has to wait for the GPU, so this is an upper bound where it comes near the GPU's own time.
        new_memory_mib: what these calls, after two that began with empty caches, took from the GPU beyond what those
            two left reserved: 0 where PyTorch's allocator serves all of them from memory it holds.
        waits: as of `waits`.
    """
    torch.cuda.empty_cache()
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = perf_counter()
        run()
        seconds.append(perf_counter() - start)
    torch.cuda.synchronize()
    return {
        "host_ms": round(median(seconds) * 1e3, 3),
        "new_memory_mib": round((torch.cuda.memory_reserved() - reserved) / 2**20, 1),
        "waits": waits(run),
    }


def waits(run: Callable[[], Any]) -> bool | str:
    """False, or what made the host wait for the GPU within a call and where in this package, by PyTorch's own watch,
    which sees reads of results and copies from or to ordinary memory; not `torch.cuda.synchronize`."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return str(error).splitlines()[0] + _place(error)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def _place(error: Exception) -> str:
    """File and line of this package that an error went through last, below the function that caught it."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if _PACKAGE in Path(f.filename).parents]
    return f" ({ours[-1]})" if ours else ""


def graph_facts(run: Callable[[], Tensor], repeats: int) -> dict[str, Any]:
    """Of a call that ran before and reads the same memory each time.

    Returns:
        graph_ms: median of the call captured in a CUDA graph and replayed, timed as `time_calls` does.
        graph_failed: why a graph is no good, in a line: the call waits, PyTorch cannot capture it, or the replay gives
            another result. A capture that broke off leaves PyTorch's default CUDA generator unusable.
    """
    if why := waits(run):
        return {"graph_failed": why}
    expected = run()
    stream = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = run()
        milliseconds = median(time_calls(graph.replay, repeats))
    except Exception as error:  # what cannot be captured must not end the measurement
        _failed.append(graph)
        torch.cuda.set_stream(stream)  # a capture that broke off leaves its own stream behind
        first = error.__context__ or error  # of two, the other says that the capture could not be ended either
        return {"graph_failed": " ".join(str(first).split())[:300]}
    same = {} if torch.equal(result, expected) else {"graph_failed": "the replay gives another result than the call"}
    return {"graph_ms": round(milliseconds, 4), **same}
