"""Which key blocks each query block attends to: the selection of sparse-linear attention.

Source: thu-ml/SLA (Apache-2.0), `sparse_linear_attention`; TurboDiffusion uses the same.
"""

import torch
from torch import Tensor

from ..errors import RequestError
from .registry import Operation


def _block_means(x: Tensor, block: int) -> Tensor:
    """[B, H, L, D] -> [B, H, ceil(L / block), D] in bfloat16; a short last block is averaged over its true rows."""
    length = x.shape[2]
    blocks = -(-length // block)
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, blocks * block - length))
    rows = torch.full((blocks, 1), float(block), device=x.device)
    rows[-1] = length - (blocks - 1) * block
    return (padded.unflatten(2, (blocks, block)).sum(dim=3) / rows).to(torch.bfloat16)


def kept_blocks(topk_ratio: float, key_blocks: int) -> int:
    """How many key blocks a query block keeps: floor(topk_ratio * key_blocks), at least 1, at most all."""
    return max(1, min(key_blocks, int(topk_ratio * key_blocks)))


def _eager(q: Tensor, k: Tensor, topk_ratio: float, block_q: int, block_k: int) -> Tensor:
    q_means = _block_means(q, block_q)
    k_means = _block_means(k - k.mean(dim=2, keepdim=True), block_k)
    scores = (q_means.float() @ k_means.float().transpose(-1, -2)).to(torch.bfloat16)
    order = scores.sort(dim=-1, descending=True, stable=True).indices  # equal scores: lowest index first
    chosen = order[..., : kept_blocks(topk_ratio, scores.shape[-1])]
    return torch.zeros_like(scores, dtype=torch.int8).scatter_(-1, chosen, 1)


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
