"""Dense attention: softmax(q k^T / sqrt(D)) v."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import RequestError
from .registry import Operation, forward_mode
from .triton import offer

_PLAIN_SCORES = 1 << 27  # at a time, about 3 GB with their tangents


def dot_product_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's attention on [..., L, D]; `bias` is the same for all queries.

    Under forward-mode AD, which its kernels lack, by the plain formula, for so many queries at a time that memory does
    not grow with the square of the length.
    """
    if not forward_mode():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    rows = max(1, _PLAIN_SCORES // (q.shape[:-2].numel() * k.shape[-2]))
    with sdpa_kernel(SDPBackend.MATH):
        parts = [F.scaled_dot_product_attention(part, k, v, attn_mask=bias) for part in q.split(rows, dim=-2)]
    return torch.cat(parts, dim=-2)


def _count_bias(count: int) -> tuple[float, float]:
    """Two logits whose exponentials add up to `count`. log(count) alone is off by up to 1.6 % when rounded to bfloat16;
    the first of these is a multiple of 1/32, exact there below 8, and leaves at most 3 % to the second."""
    first = math.floor(32 * math.log(count)) / 32
    return first, math.log(count - math.exp(first))


def in_plain_pytorch(q: Tensor, k: Tensor, v: Tensor, last_key_count: int) -> Tensor:
    """The eager twin; arguments and result as of `attention`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias = None
    if last_key_count > 1:  # n equal keys weigh as one whose logit is larger by log n
        k, v = (torch.cat([x, x[:, :, -1:]], dim=2) for x in (k, v))
        bias = torch.zeros(1, 1, 1, k.shape[2], dtype=q.dtype, device=q.device)
        bias[..., -2], bias[..., -1] = _count_bias(last_key_count)
    return dot_product_attention(q, k, v, bias).transpose(1, 2).contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, last_key_count: int) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise RequestError unless these are q [B, L, H, D] and k, v [B, M, H, D]; kernels read by these shapes."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise RequestError(f"attention takes q [B, L, H, D] and k, v [B, M, H, D], got {shapes}")
    if k.shape[1] == 0:
        raise RequestError("attention needs at least one key")


_operation = Operation("attention", in_plain_pytorch, _fake)


def attention(q: Tensor, k: Tensor, v: Tensor, last_key_count: int = 1) -> Tensor:
    """Every query attends to every key, no mask.

    Args:
        q: [B, L, H, D]. k, v: [B, M, H, D].
        last_key_count: the last key and value stand for so many equal ones.

    Returns:
        [B, L, H, D] in q's dtype.

    Raises:
        RequestError: the last key stands for none, or shapes that do not go together.
    """
    if last_key_count < 1:
        raise RequestError(f"last_key_count must be 1 or more, got {last_key_count}")
    check_heads(q, k, v)
    return _operation(q, k, v, last_key_count)


LONGEST = 1024  # keys of our kernel; beyond, PyTorch's is faster
FEW = 128  # the same where no key is repeated: 512 keys of 14B at 832x480 take 0.60 ms there, 0.78 here


def _fits_kernel(q: Tensor, k: Tensor, v: Tensor, last_key_count: int) -> str | None:
    most = FEW if last_key_count == 1 else LONGEST
    return None if k.shape[1] <= most else f"is for {most} keys at most, got {k.shape[1]}"


offer(
    _operation, "short_attention", "attention", head_sizes=(64, 128), fits=_fits_kernel,
    limits=f"up to {FEW} keys, or {LONGEST} where the last stands for many",
)  # fmt: skip
