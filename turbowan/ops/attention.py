"""Dense attention: softmax(q k^T / sqrt(D)) v."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .registry import Operation, forward_mode


def dot_product_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's attention on [..., L, D], with its plain formula under forward-mode AD, which its kernels lack."""
    if forward_mode():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _count_bias(count: int) -> tuple[float, float]:
    """Two logits whose exponentials add up to `count`. log(count) alone is off by up to 1.6 % when rounded to bfloat16;
    the first of these is a multiple of 1/32, exact there below 8, and leaves at most 3 % to the second."""
    first = math.floor(32 * math.log(count)) / 32
    return first, math.log(count - math.exp(first))


def _eager(q: Tensor, k: Tensor, v: Tensor, last_key_count: int) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias = None
    if last_key_count > 1:  # n equal keys weigh as one whose logit is larger by log n
        k, v = (torch.cat([x, x[:, :, -1:]], dim=2) for x in (k, v))
        bias = torch.zeros(1, 1, 1, k.shape[2], dtype=q.dtype, device=q.device)
        bias[..., -2], bias[..., -1] = _count_bias(last_key_count)
    return dot_product_attention(q, k, v, bias).transpose(1, 2).contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, last_key_count: int) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_operation = Operation("attention", _eager, _fake)


def attention(q: Tensor, k: Tensor, v: Tensor, last_key_count: int = 1) -> Tensor:
    """Every query attends to every key, no mask.

    Args:
        q: [B, L, H, D]. k, v: [B, M, H, D].
        last_key_count: the last key and value stand for so many equal ones.

    Returns:
        [B, L, H, D] in q's dtype.
    """
    return _operation(q, k, v, last_key_count)
