"""Sparse-linear attention on the GPU: selection, the linear branch's state, then one attention kernel."""

from torch import Tensor

from .linear_state import linear_state
from .online_softmax import heads_last
from .sage_attention import sage_attention
from .sage_quantize import quantize_blocks, quantize_values
from .select_blocks import block_means, select_blocks, token_means
from .sparse_attention import sparse_attention


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    topk_ratio: float,
    block_q: int,
    block_k: int,
    precision: str,
    q_means: Tensor | None = None,
    k_means: Tensor | None = None,
) -> Tensor:
    """As the eager twin, for blocks of 64 or 128; 8 bits where a GPU has e4m3."""
    q, k, v = (heads_last(x) for x in (q, k, v))
    lists, k_mean = selected_lists(q, k, topk_ratio, block_q, block_k, q_means, k_means)
    folded, key_sums = linear_state(k, v, proj_weight)
    if precision == "int8":
        keys, values = quantize_blocks(k, k_mean, block_k), quantize_values(v)
        return sage_attention(q, keys, values, lists, folded, key_sums, proj_bias, block_q, block_k)
    return sparse_attention(q, k, v, lists, folded, key_sums, proj_bias, block_q, block_k)


def selected_lists(
    q: Tensor,
    k: Tensor,
    topk_ratio: float,
    block_q: int,
    block_k: int,
    q_means: Tensor | None,
    k_means: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The kept key blocks, int32 [B, H, Nq, kept], ascending, and k's mean over all tokens, float32 [B, H, D]."""
    if q_means is None or k_means is None:  # as the eager twin rounds: k less its mean, token by token
        k_mean = token_means(block_means(k, block_k), k.shape[1], block_k)
        return select_blocks(block_means(q, block_q), block_means(k, block_k, k_mean), None, topk_ratio), k_mean
    k_mean = token_means(k_means, k.shape[1], block_k)
    return select_blocks(q_means, k_means, k_mean, topk_ratio), k_mean
