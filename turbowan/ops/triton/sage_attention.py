"""SageSLA's sparse branch in 8 bits, rounded step by step as the eager twin does, with the linear branch added."""

from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .approximate import reciprocal
from .linear_state import EPSILON, add_linear_branch
from .online_softmax import LOG2_E, can_describe, load_rows, rows_of
from .rounding import config_for
from .sage_quantize import as_stored, quantize_blocks, to_e4m3


@triton.jit(do_not_specialize=["length", "padded", "k_blocks", "kept"])
def _kernel(
    q,
    codes,
    k,
    v,
    out,
    lists,
    q_scales,
    k_scales,
    v_scales,
    folded,
    key_sums,
    bias,
    length,
    padded,
    k_blocks,
    kept,
    scale,
    epsilon,
    q_stride_l,
    q_stride_h,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    NATIVE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows of a query block of one head; all rows of the block share their scale."""
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    first = tl.program_id(0) * ROWS
    block = head * tl.cdiv(length, BLOCK_Q) + first // BLOCK_Q
    lists += block.to(tl.int64) * kept
    query = load_rows(codes, first, head * D, length, heads * D, ROWS, D, DESCRIPTORS)
    scale *= tl.load(q_scales + block)

    OFFSET: tl.constexpr = 8.807  # probabilities are scaled by 2^8.807, at most 447.9, before they become e4m3
    top = tl.full((ROWS,), -5e6, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    mixed = tl.zeros((ROWS, D), dtype=tl.float32)
    for j in tl.range(0, kept, num_stages=STAGES):
        index = tl.load(lists + j)
        start = index * BLOCK_K
        keys = load_rows(k, start, head * D, length, heads * D, BLOCK_K, D, DESCRIPTORS)
        step = scale * tl.load(k_scales + head * k_blocks + index)
        logits = tl.dot(query, tl.trans(keys)).to(tl.float32)
        if start + BLOCK_K > length:
            logits = tl.where((tl.arange(0, BLOCK_K) < length - start)[None, :], logits, -1e30)
        new_top = tl.maximum(top, tl.max(logits, axis=1) * step)
        p = tl.exp2(logits * step - (new_top - OFFSET)[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(p, axis=1)
        values = load_rows(v, head * D, start, heads * D, padded, D, BLOCK_K, DESCRIPTORS)
        # Hopper adds e4m3 products with 14 bits only: one block at a time, summed in float32
        mixed = mixed * decay[:, None] + tl.dot(as_stored(to_e4m3(p, NATIVE), ROWS, BLOCK_K), tl.trans(values))
        top = new_top

    rows = first + tl.arange(0, ROWS)
    inside = (rows < length)[:, None]
    columns = tl.arange(0, D)
    q += head.to(tl.int64) * q_stride_h + rows.to(tl.int64)[:, None] * q_stride_l + columns[None, :]
    query = tl.load(q, mask=inside, other=0.0)
    result = mixed * reciprocal(total)[:, None] * tl.load(v_scales + head * D + columns)[None, :]
    result = add_linear_branch(result, query, folded + head * D * D, key_sums + head * D, bias, epsilon, D)
    out += (rows.to(tl.int64)[:, None] * heads + head) * D + columns[None, :]
    tl.store(out, result.to(query.dtype), mask=inside)


@dataclass(frozen=True)
class Config:
    """rows: of a program, 64 or 128, at most the query block's; four warps hold 64.

    descriptors: whether Hopper's copy engine loads queries, keys and values. registers: of a thread, at most; with 168
    three programs of 64 rows share a multiprocessor, and two compute while one waits for its products.
    """

    rows: int
    stages: int
    descriptors: bool = False
    registers: int | None = None


# by capability (the nearest below counts), then by the key block; three programs' key blocks of 128 would not fit
CONFIGS = {
    (8, 9): dict.fromkeys((64, 128), Config(64, 2)),  # not measured
    (9, 0): {64: Config(64, 3, True, 168), 128: Config(64, 3, True)},
    (10, 0): dict.fromkeys((64, 128), Config(64, 3, True)),  # not measured
    (12, 0): dict.fromkeys((64, 128), Config(64, 2, True)),  # 99 KiB a multiprocessor; not measured
}


def candidates(block_q: int, block_k: int) -> list[Config]:
    """What a sweep tries."""
    stages = (3, 4) if block_k == 64 else (2, 3)
    copied = [Config(64, *how) for how in product(stages, (True,), (168, None))]
    return [*copied, Config(64, 3), *([Config(128, 3, True)] if block_q == 128 else [])]


def sage_attention(
    q: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    lists: Tensor,
    folded: Tensor,
    key_sums: Tensor,
    bias: Tensor,
    block_q: int,
    block_k: int,
    config: Config | None = None,
) -> Tensor:
    """8-bit attention over the listed key blocks plus the linear branch.

    Args:
        q: [B, L, H, D], last axis contiguous. keys, values: of `quantize_blocks` and `quantize_values`.
        lists: int32 [B, H, Nq, kept], ascending. folded, key_sums: of `linear_state`. bias: [D].

    Returns:
        [B, L, H, D] in q's dtype, contiguous.
    """
    config = config or config_for(CONFIGS, q.device)[block_k]
    rows = min(config.rows, block_q)
    (k, k_scales), (v, v_scales) = keys, values
    codes, q_scales = quantize_blocks(q, None, block_q)
    length, heads, size = q.shape[1:]
    padded = v.shape[-1]
    v = v.view(len(v), heads * size, 1, padded)
    descriptors = config.descriptors and can_describe(codes, k, v)
    out = q.new_empty(q.shape)
    for b in range(q.shape[0]):
        _kernel[(triton.cdiv(length, rows), heads)](
            q[b],
            rows_of(codes[b], rows, size, descriptors),
            rows_of(k[b], block_k, size, descriptors),
            rows_of(v[b], size, block_k, descriptors),
            out[b],
            lists[b],
            q_scales[b],
            k_scales[b],
            v_scales[b],
            folded[b],
            key_sums[b],
            bias,
            length,
            padded,
            k_scales.shape[-1],
            lists.shape[-1],
            size**-0.5 * LOG2_E,
            EPSILON * size / length,
            *q.stride()[1:3],
            ROWS=rows,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            D=size,
            DESCRIPTORS=descriptors,
            NATIVE=v.dtype == torch.float8_e4m3fn,
            STAGES=config.stages,
            num_warps=rows // 16,
            num_stages=config.stages,
            **({} if config.registers is None else {"maxnreg": config.registers}),
        )
    return out
