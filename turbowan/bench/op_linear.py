"""Linear layers of true shapes: products in every format, and the passes that round their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops import fp8_rowwise
from ..ops.rows import FORMATS, quantize_rows
from .case import Case, relative_error

SHAPES = {"1.3B-480p": (32760, 1536, 8960), "14B-480p": (32760, 5120, 13824), "14B-720p": (75600, 5120, 13824)}
PRODUCTS = {"int8_row": ops.product_int8_rowwise, "fp8_row": ops.product_fp8_rowwise,
            "int8_block": ops.product_int8_blockwise}  # fmt: skip
CHECKED_ROWS = 512


def cases(shape: str, device: str = "cuda") -> Iterator[Case]:
    """The products of a block (D -> 3D, D -> D, D -> F, F -> D) and the roundings of rows of D and of F.

    Args:
        shape: a key of SHAPES: rows, D, F.
    """
    m, d, f = SHAPES[shape]
    for k, n in ((d, 3 * d), (d, d), (d, f), (f, d)):
        x, weight, bias = _draw(m, k, n, device)
        yield _product_case("bf16", x, weight, partial(ops.linear, x, weight, bias), bias)
        if n == f:
            yield _product_case("bf16 gelu", x, weight, partial(ops.linear, x, weight, bias, "gelu_tanh"), None)
        for format, product in PRODUCTS.items():
            parts = (*quantize_rows(x, format), *quantize_rows(weight, format), bias, torch.bfloat16)
            yield _product_case(format, x, weight, partial(product, *parts), bias)
            if format == "fp8_row":
                exact = partial(fp8_rowwise._scaled_mm, *parts[:3], parts[3].flatten(), *parts[4:], fast=False)
                yield _product_case("fp8_row, sums in float32", x, weight, exact, bias)
            if format == "int8_row":
                if n == f:
                    yield _product_case("int8_row gelu", x, weight, partial(product, *parts, "gelu_tanh"), None)
                yield _product_case("int_mm", x, weight, partial(torch._int_mm, parts[0], parts[2].T), None)
    for k in (d, f):
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        for format in FORMATS[1:]:
            yield _rounding_case(f"quantize {format}", x, partial(quantize_rows, x, format))


def candidates(shape: str, device: str = "cuda") -> Iterator[tuple[Case, Any]]:
    """What a sweep tries, with each kernel's configuration: the D -> F product, and the rounding of rows of D."""
    from ..ops.triton import matmul_int8, quantize

    m, d, f = SHAPES[shape]
    x, weight, bias = _draw(m, d, f, device)
    products: dict[str, Callable[..., Tensor]] = {
        "int8_row": matmul_int8.product_int8_rowwise,
        "int8_block": matmul_int8.product_int8_blockwise,
    }
    for format, product in products.items():
        parts = (*quantize_rows(x, format), *quantize_rows(weight, format), bias, torch.bfloat16)
        parts = (*parts[:3], parts[3].flatten() if format == "int8_row" else parts[3], *parts[4:])
        for config in matmul_int8.candidates(format.removeprefix("int8_")):
            yield _product_case(format, x, weight, partial(product, *parts, config=config), bias), config
    roundings = {"int8_row": quantize.quantize_int8_rowwise, "int8_block": quantize.quantize_int8_blockwise}
    for format, rounding in roundings.items():
        for warps in quantize.candidates():
            yield _rounding_case(f"quantize {format}", x, partial(rounding, x, warps)), {"num_warps": warps}


def _draw(m: int, k: int, n: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((m, k), (n, k), (n,))
    x, weight, bias = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
    return x, weight, bias


def _product_case(name: str, x: Tensor, weight: Tensor, run: Callable[[], Tensor], bias: Tensor | None) -> Case:
    """A product of x [M, K] and weight [N, K]; its error, where a bias says that it can be compared, is that of the
    first rows against float32."""
    (m, k), n = x.shape, weight.shape[0]
    kind = name.split()[0].rstrip(",")
    peak = {"bf16": "bf16", "fp8_row": "fp8"}.get(kind, "int8")
    width, out = (2, 2) if kind == "bf16" else (1, 4 if kind == "int_mm" else 2)

    def error() -> float:
        exact = F.linear(x[:CHECKED_ROWS].float(), weight.float(), None if bias is None else bias.float())
        return relative_error(run()[:CHECKED_ROWS], exact)

    sizes: dict[str, int | float] = {"rows": m, "in": k, "out": n}
    moved = width * (m * k + n * k) + out * m * n
    return Case(f"{name} {k}x{n}", run, sizes, 2 * m * n * k, moved, peak, None if bias is None else error)


def _rounding_case(name: str, x: Tensor, run: Callable[[], Any]) -> Case:
    m, k = x.shape
    return Case(f"{name} {k}", run, {"rows": m, "in": k}, 0, 3 * m * k)
