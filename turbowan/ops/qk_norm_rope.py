"""What stands between the projections of q and k and self-attention: RMSNorm, rotation, and means of blocks."""

import torch
from torch import Tensor

from ..errors import RequestError
from .block_map import block_means
from .registry import Operation
from .rms_norm import rms_norm
from .rope import rope
from .triton import offer


def _eager(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normed = (rms_norm(x.flatten(2), weight, eps) for x, weight in ((q, weight_q), (k, weight_k)))
    q, k = (rope(x.unflatten(-1, q.shape[2:]), cos, sin) for x in normed)
    q_means, k_means = (
        block_means(x.transpose(1, 2), block) if block else x.new_empty(0, dtype=torch.float32)
        for x, block in ((q, block_q), (k, block_k))
    )
    return q, k, q_means, k_means


def _fake(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, size = q.shape
    q_means, k_means = (
        q.new_empty((batch, heads, -(-length // block), size) if block else 0, dtype=torch.float32)
        for block in (block_q, block_k)
    )
    return q.new_empty(q.shape), k.new_empty(k.shape), q_means, k_means


_operation = Operation("qk_norm_rope", _eager, _fake)
offer(_operation, "qk_norm_rope", "qk_norm_rope", head_sizes=(64, 128))


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    block_q: int = 0,
    block_k: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rms_norm` of q and k over their full width, `rope` of each head, and means of blocks of tokens of the results.

    Args:
        q, k: [B, L, H * D], any strides between rows and samples: parts of one [B, L, 3 * H * D] are not copied.
        weight_q, weight_k: [H * D]. cos, sin: float32 [L, D / 2] from `rope_table`, which tell D.
        block_q, block_k: tokens per block; 0 = no means wanted.

    Returns:
        q and k [B, L, H, D] in q's dtype, rounded after the norm and after the rotation; float32 means
        [B, H, ceil(L / block_q), D] and [B, H, ceil(L / block_k), D], a short last block over its true rows (empty
        where none are wanted).

    Raises:
        RequestError: the tables are for another length or the width is no multiple of their head size.
    """
    size = 2 * cos.shape[1]
    if cos.shape[0] != q.shape[1] or q.shape[2] % size:
        raise RequestError(f"rotation is for {cos.shape[0]} tokens of head size {size}, got q {tuple(q.shape)}")
    q, k = (x.unflatten(-1, (-1, size)) for x in (q, k))
    return _operation(q, k, weight_q, weight_k, cos, sin, eps, block_q, block_k)
