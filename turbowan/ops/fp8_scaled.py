"""Linear layers whose weights are stored in 8 bits with a scale and multiplied in full precision.

ComfyUI's `fp8_scaled` files, and int8 where activations stay as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Operation


def _eager(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    scale, few = weight_scale.float(), x.numel() // x.shape[-1] < x.shape[-1]
    if few and x.dtype != torch.float16:
        # 8-bit codes are numbers of bfloat16 as they are; the smaller thing is scaled (in float16 it could overflow)
        out = F.linear(x, weight.to(x.dtype)).mul_(scale)
        return out if bias is None else out.add_(bias)
    full = (weight.float() * scale.view(-1, 1)).to(x.dtype)
    return F.linear(x, full, None if bias is None else bias.to(x.dtype))


def _fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_operation = Operation("linear_fp8_scaled", _eager, _fake)


def linear_fp8_scaled(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with W = weight * weight_scale expanded for the product; the stored weight stays in 8 bits.

    Args:
        x: [..., K]. weight: float8 or int8 [N, K]. weight_scale: float32, one value or [N]. bias: [N] or None.

    Returns:
        [..., N] in x's dtype.
    """
    return _operation(x, weight, weight_scale, bias)
