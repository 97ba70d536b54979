"""Which key blocks each query block attends to: the selection of sparse-linear attention.

Source: thu-ml/SLA (Apache-2.0), `sparse_linear_attention`; TurboDiffusion uses the same.
"""

import torch
from torch import Tensor

from ..errors import RequestError
from .registry import Operation


def _true_rows(length: int, block: int, device: torch.device) -> Tensor:
    """Tokens in each block: float32 [N, 1]; the last may have fewer."""
    blocks = -(-length // block)
    rows = torch.full((blocks, 1), float(block), device=device)
    rows[-1] = length - (blocks - 1) * block
    return rows


def block_means(x: Tensor, block: int) -> Tensor:
    """[B, H, L, D] -> float32 [B, H, ceil(L / block), D]; a short last block is averaged over its true rows."""
    rows = _true_rows(x.shape[2], block, x.device)
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, -x.shape[2] % block))
    return padded.unflatten(2, (-1, block)).sum(dim=3) / rows


def kept_blocks(topk_ratio: float, key_blocks: int) -> int:
    """How many key blocks a query block keeps: floor(topk_ratio * key_blocks), at least 1, at most all."""
    return max(1, min(key_blocks, int(topk_ratio * key_blocks)))


def _scores(q_means: Tensor, k_means: Tensor) -> Tensor:
    """Products of block means, both and the result rounded to bfloat16: [B, H, Nq, Nk]."""
    q_means, k_means = (x.to(torch.bfloat16).float() for x in (q_means, k_means))
    return (q_means @ k_means.transpose(-1, -2)).to(torch.bfloat16)


def _highest(scores: Tensor, topk_ratio: float) -> Tensor:
    order = scores.sort(dim=-1, descending=True, stable=True).indices  # equal scores: lowest index first
    return order[..., : kept_blocks(topk_ratio, scores.shape[-1])]


def _eager(q: Tensor, k: Tensor, topk_ratio: float, block_q: int, block_k: int) -> Tensor:
    scores = _scores(block_means(q, block_q), block_means(k - k.mean(dim=2, keepdim=True), block_k))
    return torch.zeros_like(scores, dtype=torch.int8).scatter_(-1, _highest(scores, topk_ratio), 1)


def selected_from_means(q_means: Tensor, k_means: Tensor, length: int, topk_ratio: float, block_k: int) -> Tensor:
    """The same selection where the blocks' means are known: ascending indices [B, H, Nq, kept].

    Here k's mean is taken off the block means in float32, not off every token in k's dtype; scores that are nearly
    equal may fall the other way.

    Args:
        q_means, k_means: float32 [B, H, Nq, D] and [B, H, Nk, D], of q and k as they are. length: of k, in tokens.
    """
    k_mean = (k_means * _true_rows(length, block_k, k_means.device)).sum(dim=2, keepdim=True) / length
    return _highest(_scores(q_means, k_means - k_mean), topk_ratio).sort(dim=-1).values


def _fake(q: Tensor, k: Tensor, topk_ratio: float, block_q: int, block_k: int) -> Tensor:
    shape = (*q.shape[:2], -(-q.shape[2] // block_q), -(-k.shape[2] // block_k))
    return q.new_empty(shape, dtype=torch.int8)


_operation = Operation("block_map", _eager, _fake)


def block_map(q: Tensor, k: Tensor, topk_ratio: float, block_q: int = 128, block_k: int = 64) -> Tensor:
    """Select key blocks by the product of block means.

    The mean of k over all tokens is taken off first. Block means (float32 sums over the true rows) and scores are
    rounded to bfloat16 whatever the input's dtype, as the official code computes them.

    Args:
        q, k: [B, H, L, D].
        topk_ratio: share of key blocks kept, in (0, 1]; per row max(1, min(Nk, floor(topk_ratio * Nk))).
        block_q, block_k: tokens per block.

    Returns:
        int8 [B, H, ceil(L / block_q), ceil(L / block_k)], 1 where the key block is kept.
        Among equal scores the lowest index is kept first.

    Raises:
        RequestError: topk_ratio is not in (0, 1].
    """
    if not 0 < topk_ratio <= 1:
        raise RequestError(f"sla_topk must be in (0, 1], got {topk_ratio}")
    return _operation(q, k, topk_ratio, block_q, block_k)
