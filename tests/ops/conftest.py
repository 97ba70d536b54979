"""What the kernels' tests share: outputs that start as rubbish between guards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from turbowan import ops
from turbowan.ops.rows import quantize_rows

GUARD = 64  # bytes on each side
RUBBISH = 0xFF  # NaN in every float format


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a kernel's launcher; what it allocates by `new_empty` starts as NaN, and its surroundings are checked."""

    def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        buffers = []
        plain = torch.Tensor.new_empty

        def new_empty(x: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
            if "device" in options:  # Triton's interpreter itself
                return plain(x, *size, **options)
            shape = size[0] if isinstance(size[0], (tuple, list)) else size
            dtype = options.get("dtype", x.dtype)
            count = math.prod(shape) * dtype.itemsize
            buffers.append(torch.full((count + 2 * GUARD,), RUBBISH, dtype=torch.uint8, device=x.device))
            return buffers[-1][GUARD : GUARD + count].view(dtype).view(shape)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", new_empty)
            result = function(*args, **options)
        assert buffers
        for buffer in buffers:
            assert (buffer[:GUARD] == RUBBISH).all(), "the kernel wrote before its output"
            assert (buffer[-GUARD:] == RUBBISH).all(), "the kernel wrote past its output"
        return result

    return call


@pytest.fixture
def rounded_rows() -> Callable[[torch.Tensor, str], tuple[torch.Tensor, torch.Tensor]]:
    """`quantize_rows` by its eager twins, also where a kernel would be chosen."""

    def by_specification(x: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
        names = ("quantize_int8_rowwise", "quantize_fp8_rowwise", "quantize_int8_blockwise")
        with ops.force(**dict.fromkeys(names, "eager")):
            return quantize_rows(x, format)

    return by_specification
