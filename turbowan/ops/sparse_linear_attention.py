"""Sparse-linear attention (SLA) and its 8-bit form (SageSLA).

Two branches are added: exact attention over the selected key blocks, and linear attention over all keys, projected by
`proj_l`. Source: thu-ml/SLA and thu-ml/SpargeAttn (Apache-2.0); constants as in `TurboDiffusion/SLA`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RequestError
from .attention import check_heads, dot_product_attention
from .block_map import block_map, kept_blocks, selected_from_means
from .registry import Constraints, Implementation, Operation, differentiated
from .triton import TRITON, offer

PRECISIONS = ("bf16", "int8")
_GATHER_ELEMENTS = 1 << 27  # bounds the scratch memory of the exact branch: never an L x L mask
_LOG2_E = 1.4426950408889634
_P_OFFSET = 8.807  # P is scaled by 2^8.807 (at most 447.9) before it is rounded to e4m3, whose largest value is 448
_V_RANGE = 2.25  # keeps 64 products of P and V within float16 in the official kernels


def _selected(q: Tensor, k: Tensor, topk_ratio: float, block_q: int, block_k: int) -> Tensor:
    """Ascending indices of the kept key blocks: [B, H, Nq, K]."""
    kept = block_map(q, k, topk_ratio, block_q, block_k)
    order = kept.sort(dim=-1, descending=True, stable=True).indices
    return order[..., : kept_blocks(topk_ratio, kept.shape[-1])]


def _blocks(x: Tensor, block: int) -> Tensor:
    """[B, H, L, D] -> [B*H, N, block, D], zero-filled at the end."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % block))
    return x.unflatten(2, (-1, block)).flatten(0, 1)


def _heads_then_blocks(index: Tensor) -> tuple[Tensor, Tensor]:
    """Index pair that gathers key blocks [BH, N, block, D] for query blocks: [BH, q, K] -> [BH, q, K, block, D]."""
    return torch.arange(index.shape[0], device=index.device)[:, None, None], index


def _query_chunks(query_blocks: int, elements_per_block: int) -> Iterator[slice]:
    step = max(1, _GATHER_ELEMENTS // max(1, elements_per_block))
    for start in range(0, query_blocks, step):
        yield slice(start, min(start + step, query_blocks))


def exact_branch(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block_q: int, block_k: int) -> Tensor:
    """Exact attention over the chosen key blocks: [B, H, L, D]. Gathers a bounded number of query blocks at a time."""
    length = q.shape[2]
    query, key, value = _blocks(q, block_q), _blocks(k, block_k), _blocks(v, block_k)
    chosen = chosen.flatten(0, 1)
    position = torch.arange(key.shape[1] * block_k, device=q.device).view(-1, block_k)
    bias = torch.zeros(position.shape, dtype=q.dtype, device=q.device).masked_fill(position >= length, -torch.inf)
    out = torch.empty_like(query)
    for rows in _query_chunks(query.shape[1], query.shape[0] * chosen.shape[-1] * block_k * q.shape[-1]):
        index = _heads_then_blocks(chosen[:, rows])
        keys, values = (x[index].flatten(2, 3) for x in (key, value))
        mask = bias[chosen[:, rows]].flatten(2, 3).unsqueeze(2) if length % block_k else None
        out[:, rows] = dot_product_attention(query[:, rows], keys, values, mask)
    return out.flatten(1, 2)[:, :length].unflatten(0, q.shape[:2])


def _quantize_block(x: Tensor) -> tuple[Tensor, Tensor]:
    """[BH, N, block, D] -> integers in float32 (half away from zero) and one scale per block [BH, N, 1, 1]."""
    x = x.float()
    scale = x.abs().amax(dim=(-1, -2), keepdim=True) / 127 + 1e-7
    ratio = x / scale
    return torch.trunc(ratio + torch.where(ratio < 0, -0.5, 0.5)), scale


def exact_branch_int8(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block_q: int, block_k: int) -> Tensor:
    """The sparse branch with SageSLA's rounding: int8 q and k per block, e4m3 v per channel, e4m3 probabilities.

    Streams over each query block's keys in ascending order, as the official kernels do: a probability is rounded
    relative to the running maximum, so the order is part of the result.
    """
    length, dim = q.shape[2], q.shape[3]
    query, q_scale = _quantize_block(_blocks(q, block_q))
    key, k_scale = _quantize_block(_blocks(k - k.mean(dim=2, keepdim=True), block_k))
    v_scale = v.float().abs().amax(dim=2, keepdim=True).clamp(min=1e-12) / _V_RANGE
    value = _blocks((v.float() / v_scale).to(torch.float8_e4m3fn).float(), block_k)
    chosen = chosen.flatten(0, 1)
    position = torch.arange(block_k, device=q.device)

    top = torch.full((*query.shape[:3], 1), -5e6, device=q.device)
    total = torch.zeros_like(top)
    out = torch.zeros(query.shape, device=q.device)
    for j in range(chosen.shape[-1]):
        index = _heads_then_blocks(chosen[..., j : j + 1])
        keys, key_scale, values = (x[index].squeeze(2) for x in (key, k_scale, value))
        logits = (query @ keys.transpose(-1, -2)) * (q_scale * key_scale * (dim**-0.5 * _LOG2_E))
        past_end = chosen[..., j, None, None] * block_k + position >= length
        logits = logits.masked_fill(past_end, -5e6)
        new_top = torch.maximum(top, logits.amax(dim=-1, keepdim=True))
        p = torch.exp2(logits - new_top + _P_OFFSET)
        decay = torch.exp2(top - new_top)
        total = total * decay + p.sum(dim=-1, keepdim=True)
        out = out * decay + p.to(torch.float8_e4m3fn).float() @ values
        top = new_top
    out = (out / total).flatten(1, 2)[:, :length].unflatten(0, q.shape[:2])
    return (out * v_scale).to(q.dtype)


def _linear_branch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention over all keys with softmax feature maps: [B, H, L, D]."""
    q, k = q.softmax(dim=-1), k.softmax(dim=-1)
    return (q @ (k.transpose(-1, -2) @ v)) / (1e-5 + (q * k.sum(dim=2, keepdim=True)).sum(dim=-1, keepdim=True))


def in_plain_pytorch(
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
    """The eager twin; arguments and result as of `sparse_linear_attention`, `means` one by one."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q_means is None or k_means is None:
        chosen = _selected(q.detach(), k.detach(), topk_ratio, block_q, block_k)  # no gradient through the selection
    else:
        chosen = selected_from_means(q_means.detach(), k_means.detach(), k.shape[2], topk_ratio, block_k)
    branch = exact_branch_int8 if precision == "int8" else exact_branch
    sparse = branch(q, k, v, chosen, block_q, block_k)
    linear = F.linear(_linear_branch(q, k, v), proj_weight.to(q.dtype), proj_bias.to(q.dtype))
    return (sparse + linear).transpose(1, 2).contiguous()


def _fake(
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
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_operation = Operation("sparse_linear_attention", in_plain_pytorch, _fake)


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    topk_ratio: float,
    block_q: int = 128,
    block_k: int = 64,
    precision: str = "bf16",
    means: Sequence[Tensor] | None = None,
) -> Tensor:
    """Attention over the top key blocks plus a projected linear branch over all keys.

    Args:
        q, k, v: [B, L, H, D]; any length (a short last block is masked).
        proj_weight, proj_bias: [D, D] and [D], as in `nn.Linear`, shared by all heads.
        topk_ratio: share of key blocks kept, in (0, 1].
        block_q, block_k: tokens per block, 128 and 64; the official SageSLA uses 64 and 128 on Hopper.
        precision: "bf16" multiplies in q's dtype (SLA); "int8" rounds q, k, v and probabilities to 8 bits (SageSLA).
        means: float32 means of q's and of k's blocks, [B, H, ceil(L / block_q), D] and [B, H, ceil(L / block_k), D],
            if the producer of q and k has them already; the selection then needs no pass over q and k.

    Returns:
        [B, L, H, D] in q's dtype.

    Raises:
        RequestError: topk_ratio is not in (0, 1], the precision is unknown, a gradient is wanted through "int8", or
            shapes, those of the means among them, that do not go together.
    """
    if precision not in PRECISIONS:
        raise RequestError(f"precision must be one of {', '.join(PRECISIONS)}, got '{precision}'")
    if not 0 < topk_ratio <= 1:
        raise RequestError(f"sla_topk must be in (0, 1], got {topk_ratio}")
    if precision == "int8" and differentiated((q, k, v)):
        raise RequestError("SageSLA rounds to 8 bits and has no gradient; train with 'sla' (precision 'bf16')")
    check_heads(q, k, v)
    size = q.shape[3]
    projected = proj_weight.shape == (size, size) and proj_bias.shape == (size,)
    if q.shape != k.shape or not projected or min(block_q, block_k) < 1:
        raise RequestError(
            f"q, k and v must be as long as each other, the projection [{size}, {size}] and [{size}], blocks positive;"
            f" got {q.shape[1]} and {k.shape[1]} tokens, {list(proj_weight.shape)}, {list(proj_bias.shape)} and"
            f" {block_q} x {block_k}"
        )
    q_means, k_means = (None, None) if means is None else means
    for name, given, block in (("q", q_means, block_q), ("k", k_means, block_k)):
        if given is not None and given.shape != (wanted := (q.shape[0], q.shape[2], -(-q.shape[1] // block), size)):
            raise RequestError(f"means of {name}'s blocks of {block} must be {list(wanted)}, got {list(given.shape)}")
    return _operation(q, k, v, proj_weight, proj_bias, topk_ratio, block_q, block_k, precision, q_means, k_means)


_KERNEL_BLOCKS = (64, 128)  # tokens
_E4M3_FROM = (8, 9)  # compute capability


def _fits_kernels(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, topk_ratio: float,
    block_q: int, block_k: int, precision: str, *means: Tensor | None,
) -> str | None:  # fmt: skip
    if block_q not in _KERNEL_BLOCKS or block_k not in _KERNEL_BLOCKS:
        return f"needs blocks of {'/'.join(map(str, _KERNEL_BLOCKS))} tokens, got {block_q} and {block_k}"
    if precision == "int8" and q.is_cuda:
        capability = torch.cuda.get_device_capability(q.device)
        if capability < _E4M3_FROM:
            return f"8 bits need compute capability {_E4M3_FROM}, got {capability}"
    return None


def _fits_cudnn(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, topk_ratio: float,
    block_q: int, block_k: int, precision: str, *means: Tensor | None,
) -> str | None:  # fmt: skip
    from .cudnn_attention import BLOCK, problem

    if precision != "bf16" or block_k != BLOCK or block_q not in _KERNEL_BLOCKS:
        return f"is for key blocks of {BLOCK} and precision bf16, got {block_q} x {block_k} and {precision}"
    return problem(q.device, q.dtype, q.shape[-1])


def _by_cudnn(*args: Any) -> Tensor:
    from .cudnn_attention import sparse_linear_attention

    return sparse_linear_attention(*args)


offer(
    _operation, "sparse_linear_attention", "sparse_linear_attention", head_sizes=(64, 128), fits=_fits_kernels,
    limits="blocks of 64 and 128, in 8 bits from compute capability 8.9 on",
)  # fmt: skip
for _from, _to, _priority in (((9, 0), (9, 0), -1), ((10, 0), None, 2)):  # on Hopper our own kernel is the faster one
    _where = Constraints(
        ("cuda",), (torch.bfloat16, torch.float16), (64, 128), _from, _to, packages=("cudnn", TRITON)
    )
    _limits = "key blocks of 64 in bf16, once it has passed its self-test"
    _operation.add(Implementation("cudnn", _by_cudnn, _where, _priority, _fits_cudnn, _limits))
