"""Our kernels. Nothing here is imported before one of them runs, so the package works where there is no Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

from ..registry import Constraints, Implementation, Operation

TRITON = "triton>=3.4"  # tensor descriptors and what else our kernels name; older ones are not tried
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported: it stays as it was then


def offer(
    operation: Operation,
    module: str,
    function: str,
    name: str = "triton",
    dtypes: tuple[torch.dtype, ...] | None = (torch.bfloat16, torch.float16),
    head_sizes: tuple[int, ...] | None = None,
    min_capability: tuple[int, int] = (8, 0),
    priority: int = 1,
    fits: Callable[..., str | None] | None = None,
    limits: str = "",
) -> None:
    """Let an operation choose a kernel: `function` of the file `module` beside this one, loaded at its first use.

    With Triton's interpreter (`TRITON_INTERPRET=1`) it also runs on a CPU, in float32 and float16 too, where it is
    forced: for tests.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return _load(module, function)(*args, **kwargs)

    cuda = Constraints(("cuda",), dtypes, head_sizes, min_capability, packages=(TRITON,))
    operation.add(Implementation(name, run, cuda, priority, fits, limits))
    if INTERPRETED:
        cpu = Constraints(("cpu",), None, head_sizes, packages=(TRITON,))
        operation.add(Implementation(name, run, cpu, -1, fits, limits))


@cache
def _load(module: str, function: str) -> Callable[..., Any]:
    return getattr(import_module(f".{module}", __name__), function)  # type: ignore[no-any-return]
