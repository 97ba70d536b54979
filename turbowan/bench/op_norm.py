"""What stands between the linear layers of a block, in every format: residuals and norms, GELU; and a copy, beside
which they are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.int8_blockwise import BLOCK, dequantize_int8_blockwise
from ..ops.rows import FORMATS
from .case import Case, relative_error
from .op_linear import CHECKED_ROWS, SHAPES

# the three norms of a block: which tensors go in beside x
KINDS = {
    "first": ("shift", "scale"),
    "gated": ("delta", "gate", "weight", "bias"),
    "second": ("delta", "shift", "scale"),
}


def cases(shape: str, device: str = "cuda") -> Iterator[Case]:
    """Copies of [rows, D] and [rows, F], `residual_norm` as in its three places and `gelu_rows`, in every format.

    Args:
        shape: a key of `op_linear.SHAPES`: rows, D, F.
    """
    length, width, hidden = SHAPES[shape]
    tensors = _draw(length, width, device)
    yield Case(f"copy {width}", tensors["x"].clone, {"rows": length, "width": width}, 0, 4 * length * width)
    for kind in KINDS:
        for format in FORMATS:
            yield _norm_case(tensors, kind, format, ops.residual_norm)
    del tensors
    x = torch.randn(1, length, hidden, device=device, dtype=torch.bfloat16)
    yield Case(f"copy {hidden}", x.clone, {"rows": length, "width": hidden}, 0, 4 * length * hidden)
    for format in FORMATS:
        yield _gelu_case(x, format, ops.gelu_rows)


def candidates(shape: str, device: str = "cuda") -> Iterator[tuple[Case, Any]]:
    """What a sweep tries, with each kernel's configuration; shape as in `cases`."""
    from ..ops.triton import gelu_rows, residual_norm

    length, width, hidden = SHAPES[shape]
    tensors = _draw(length, width, device)
    absent: dict[str, Any] = dict.fromkeys(("delta", "gate", "weight", "bias", "shift", "scale"))
    for kind, format in (("first", "int8_row"), ("second", "int8_row"), ("gated", "bf16"), ("first", "int8_block")):
        for config in residual_norm.candidates():
            fixed: dict[str, Any] = {**absent, "eps": 1e-6, "variance": "exact", "config": config}
            norm = partial(residual_norm.residual_norm, **fixed)
            yield _norm_case(tensors, kind, format, norm), config
    del tensors
    x = torch.randn(1, length, hidden, device=device, dtype=torch.bfloat16)
    for format in ("int8_row", "bf16", "int8_block"):
        for gelu_config in gelu_rows.candidates():
            gelu = partial(gelu_rows.gelu_rows, config=gelu_config)
            yield _gelu_case(x, format, gelu), gelu_config


def _draw(length: int, width: int, device: str) -> dict[str, Tensor]:
    x, delta = torch.randn(2, 1, length, width, device=device, dtype=torch.bfloat16).unbind(0)
    weight, bias = torch.randn(2, width, device=device, dtype=torch.bfloat16).unbind(0)
    shift, scale, gate = torch.randn(1, 6, width, device=device).unsqueeze(2).unbind(1)[:3]
    return {"x": x, "delta": delta, "gate": gate, "weight": weight, "bias": bias, "shift": shift, "scale": scale}


def _norm_case(tensors: dict[str, Tensor], kind: str, format: str, function: Callable[..., tuple[Tensor, ...]]) -> Case:
    x = tensors["x"]
    given: dict[str, Any] = {name: tensors[name] for name in KINDS[kind]}
    _, length, width = x.shape
    run = partial(function, x, **given, format=format)

    def error() -> float:
        rows = {name: value[:, :CHECKED_ROWS].float() if name == "delta" else value for name, value in given.items()}
        with ops.force(residual_norm="eager"):
            exact = ops.residual_norm(x[:, :CHECKED_ROWS].float(), **rows)[1]
        return _error(run()[1:], exact, format)

    moved = (6 if "delta" in given else 2) * length * width + _bytes(length, width, format)
    return Case(f"residual_norm {kind} {format} {width}", run, {"rows": length, "width": width}, 0, moved, error=error)


def _gelu_case(x: Tensor, format: str, function: Callable[..., tuple[Tensor, ...]]) -> Case:
    _, length, width = x.shape
    run = partial(function, x, format)

    def error() -> float:
        with ops.force(gelu_rows="eager"):
            exact = ops.gelu_rows(x[:, :CHECKED_ROWS].float())[0]
        return _error(run(), exact, format)

    moved = 2 * length * width + _bytes(length, width, format)
    return Case(f"gelu_rows {format} {width}", run, {"rows": length, "width": width}, 0, moved, error=error)


def _bytes(length: int, width: int, format: str) -> int:
    """Of rows and their scales."""
    if format == "bf16":
        return 2 * length * width
    return length * width + 4 * (length * width // BLOCK**2 if format == "int8_block" else length)


def _error(found: tuple[Tensor, ...], exact: Tensor, format: str) -> float:
    """Of the first rows, as numbers."""
    values, scale = found[0][:CHECKED_ROWS], found[1]
    if format == "int8_block":
        ours = dequantize_int8_blockwise(values, scale[: CHECKED_ROWS // BLOCK])
    else:
        ours = values.float() * (1 if format == "bf16" else scale[:CHECKED_ROWS])
    return relative_error(ours, exact)
