"""8-bit linear layers with one scale per row: the format of lightx2v's int8 files.

Weights carry one scale per output row, activations one per token; both are amax / 127.
"""

import torch
from torch import Tensor

from .int8_blockwise import integer_product
from .registry import Operation


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127
    return (x / scale).round().clamp(-128, 127).to(torch.int8).contiguous(), scale


def _quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    codes, scale = _quantize(x)
    out = x.new_zeros(x.shape[0], weight.shape[0], dtype=torch.float32)
    for start in range(0, x.shape[1], 1024):  # sums of 1024 products of int8 codes are exact in float32
        part = slice(start, start + 1024)
        out += integer_product(codes[:, part], weight[:, part])
    out = out * scale * weight_scale.view(1, -1)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _linear_fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_quantize_operation = Operation("quantize_int8_rowwise", _quantize, _quantize_fake)
_linear_operation = Operation("linear_int8_rowwise", _linear, _linear_fake, gradient=False)


def quantize_int8_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] -> int8 [M, K] and float32 scales [M, 1] (amax / 127, round half to even)."""
    return _quantize_operation(x)


def linear_int8_rowwise(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias in int8 with a scale per token and per output row.

    Args:
        x: [M, K]. weight: int8 [N, K]. weight_scale: float32 [N] or [N, 1]. bias: [N] or None.

    Returns:
        [M, N] in x's dtype, rounded once, after the bias.
    """
    return _linear_operation(x, weight, weight_scale, bias)
