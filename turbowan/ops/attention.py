"""Dense attention: softmax(q k^T / sqrt(D)) v."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Operation


def _eager(q: Tensor, k: Tensor, v: Tensor, last_key_count: int) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias = None
    if last_key_count > 1:  # n equal keys weigh as one whose logit is larger by log n
        bias = torch.zeros(1, 1, 1, k.shape[2], dtype=q.dtype, device=q.device)
        bias[..., -1] = math.log(last_key_count)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).contiguous()


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
