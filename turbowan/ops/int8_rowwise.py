"""8-bit linear layers with one scale per row: the format of lightx2v's int8 files.

Weights carry one scale per output row, activations one per token; both are amax / 127.
"""

import torch
from torch import Tensor

from .epilogue import check_product, finish, product_fake, product_flops
from .int8_blockwise import FLOATS, integer_product
from .registry import Operation
from .triton import offer


def exact_ratio(x: Tensor, divisor: float) -> Tensor:
    """x / divisor as IEEE division rounds it; on a GPU PyTorch multiplies by 1 / divisor where that is a number."""
    return x / torch.full_like(x, divisor)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    scale = exact_ratio(x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5), 127)
    return (x / scale).round().clamp(-128, 127).to(torch.int8).contiguous(), scale


def _quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _product(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
) -> Tensor:
    out = codes.new_zeros(codes.shape[0], weight.shape[0], dtype=torch.float32)
    for start in range(0, codes.shape[1], 1024):  # sums of 1024 products of int8 codes are exact in float32
        part = slice(start, start + 1024)
        out += integer_product(codes[:, part], weight[:, part])
    return finish(out * scale * weight_scale, bias, dtype, activation)


_quantize_operation = Operation("quantize_int8_rowwise", _quantize, _quantize_fake)
_product_operation = Operation(
    "product_int8_rowwise", _product, product_fake, product_flops, gradient=False, reads=torch.int8
)


def quantize_int8_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] -> int8 [M, K] and float32 scales [M, 1] (amax / 127, round half to even)."""
    return _quantize_operation(x)


def product_int8_rowwise(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
) -> Tensor:
    """Rows already in int8 times W^T, scaled, + bias: an integer sum over all of K, then float32.

    Args:
        codes: int8 [M, K]. scale: float32 [M, 1]. weight: int8 [N, K]. weight_scale: float32 [N] or [N, 1].
        bias: [N] or None. dtype: of the result. activation: "none", or "gelu_tanh" of the rounded result.

    Returns:
        [M, N] in `dtype`, rounded once, after the bias.

    Raises:
        RequestError: no such activation, or shapes that do not go together.
    """
    weight_scale = weight_scale.flatten()
    check_product(codes, scale, weight, weight_scale, bias, activation, ((codes.shape[0], 1), (weight.shape[0],)))
    return _product_operation(codes, scale, weight, weight_scale, bias, dtype, activation)


def linear_int8_rowwise(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias in int8 with a scale per token and per output row.

    Args:
        x: [M, K]. weight: int8 [N, K]. weight_scale: float32 [N] or [N, 1]. bias: [N] or None.

    Returns:
        [M, N] in x's dtype, rounded once, after the bias.

    Raises:
        RequestError: shapes that do not go together.
    """
    return product_int8_rowwise(*quantize_int8_rowwise(x), weight, weight_scale, bias, x.dtype)


offer(_quantize_operation, "quantize", "quantize_int8_rowwise", dtypes=FLOATS)
offer(_product_operation, "matmul_int8", "product_int8_rowwise", dtypes=(torch.int8,))
