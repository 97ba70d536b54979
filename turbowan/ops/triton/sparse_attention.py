"""Exact attention over listed key blocks; the linear branch is added before the result is stored, once."""

from dataclasses import dataclass
from itertools import product

import triton
import triton.language as tl
from torch import Tensor

from .hopper import HAS_GLUON
from .linear_state import EPSILON, add_linear_branch
from .online_softmax import LOG2_E, attend, can_describe, load_rows, rows_of
from .rounding import config_for


@triton.jit(do_not_specialize=["length", "kept"])
def _kernel(
    q,
    k,
    v,
    out,
    lists,
    folded,
    key_sums,
    bias,
    length,
    kept,
    scale,
    epsilon,
    q_stride_l,
    q_stride_h,
    k_stride_l,
    k_stride_h,
    v_stride_l,
    v_stride_h,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows of a query block of one head. Programs of a head follow each other: its keys and values stay in L2."""
    head = tl.program_id(1)
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    inside = (rows < length)[:, None]
    columns = tl.arange(0, D)
    q += head.to(tl.int64) * q_stride_h + rows.to(tl.int64)[:, None] * q_stride_l + columns[None, :]
    lists += (head.to(tl.int64) * tl.cdiv(length, BLOCK_Q) + first // BLOCK_Q) * kept
    query = tl.load(q, mask=inside, other=0.0)

    TILES: tl.constexpr = BLOCK_K // TILE
    top = tl.full((ROWS,), -1e30, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    mixed = tl.zeros((ROWS, D), dtype=tl.float32)
    for j in tl.range(0, kept * TILES, num_stages=STAGES):
        start = tl.load(lists + j // TILES) * BLOCK_K + (j % TILES) * TILE
        keys = load_rows(k, start, head * k_stride_h, length, k_stride_l, TILE, D, DESCRIPTORS)
        logits = tl.dot(query, tl.trans(keys))
        if start + TILE > length:  # in the last key block only; its first tile holds a key, so `top` is finite by then
            logits = tl.where((start + tl.arange(0, TILE) < length)[None, :], logits, -1e30)
        values = load_rows(v, start, head * v_stride_h, length, v_stride_l, TILE, D, DESCRIPTORS)
        top, total, mixed = attend(logits, values, top, total, mixed, scale)

    query = tl.load(q, mask=inside, other=0.0, cache_modifier=".cg")  # kept over the loop it would cost 32 registers
    result = mixed / total[:, None]
    result = add_linear_branch(result, query, folded + head * D * D, key_sums + head * D, bias, epsilon, D)
    out += (rows.to(tl.int64)[:, None] * tl.num_programs(1) + head) * D + columns[None, :]
    tl.store(out, result.to(query.dtype), mask=inside)


@dataclass(frozen=True)
class Config:
    """rows: of a program, 64 or 128, at most the query block's, which share its list; four warps hold 64.

    tile: keys per step. descriptors: whether Hopper's copy engine loads them (never where strides forbid it).
    """

    rows: int
    stages: int
    tile: int = 64
    descriptors: bool = False


@dataclass(frozen=True)
class HopperConfig:
    """The kernel of `hopper_attention.py`, for query blocks of 128. stages: of 64 keys and values, 2 to 4."""

    stages: int = 4


# by capability, the nearest below counts; in order of preference: the first that can run does
CONFIGS: dict[tuple[int, int], tuple[Config | HopperConfig, ...]] = {
    (8, 0): (Config(64, 2),),  # not measured
    (9, 0): (HopperConfig(), Config(64, 3, descriptors=True)),  # 14B at 832x480: 3.6 ms, 4.4; 128 rows 5.2
    (10, 0): (Config(128, 3, descriptors=True),),  # not measured
    (12, 0): (Config(64, 2, descriptors=True),),  # 99 kB a program; not measured
}


def candidates(block_q: int, block_k: int) -> list[Config | HopperConfig]:
    """What a sweep tries."""
    tiles = [tile for tile in (64, 128) if tile <= block_k]
    heights = [rows for rows in (64, 128) if rows <= block_q]
    by_hand: list[Config | HopperConfig] = [HopperConfig(stages) for stages in (3, 4) if HAS_GLUON and block_q == 128]
    return by_hand + [Config(*how) for how in product(heights, (2, 3), tiles, (True, False))]


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    folded: Tensor,
    key_sums: Tensor,
    bias: Tensor,
    block_q: int,
    block_k: int,
    config: Config | HopperConfig | None = None,
) -> Tensor:
    """Attention over the listed key blocks plus the linear branch.

    Args:
        q, k, v: [B, L, H, D], D 64 or 128, last axis contiguous.
        lists: int32 [B, H, Nq, kept], ascending. folded, key_sums: of `linear_state`. bias: [D].
        block_q, block_k: 64 or 128.

    Returns:
        [B, L, H, D] in q's dtype, contiguous.
    """
    config = config or _choose(q, k, v, block_q)
    if isinstance(config, HopperConfig):
        from .hopper_attention import attention

        return attention(q, k, v, lists, folded, key_sums, bias, block_k, config.stages)
    rows = min(config.rows, block_q)
    descriptors = config.descriptors and can_describe(k, v)
    length, heads, size = q.shape[1:]
    out = q.new_empty(q.shape)
    for b in range(q.shape[0]):  # a sample's rows end where a descriptor ends
        _kernel[(triton.cdiv(length, rows), heads)](
            q[b],
            rows_of(k[b], config.tile, size, descriptors),
            rows_of(v[b], config.tile, size, descriptors),
            out[b],
            lists[b],
            folded[b],
            key_sums[b],
            bias,
            length,
            lists.shape[-1],
            size**-0.5 * LOG2_E,
            EPSILON * size / length,
            *q.stride()[1:3],
            *k.stride()[1:3],
            *v.stride()[1:3],
            ROWS=rows,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            TILE=config.tile,
            D=size,
            DESCRIPTORS=descriptors,
            STAGES=config.stages,
            num_warps=rows // 16,
            num_stages=config.stages,
        )
    return out


def _choose(q: Tensor, k: Tensor, v: Tensor, block_q: int) -> Config | HopperConfig:
    by_hand = HAS_GLUON and block_q == 128 and can_describe(q, k, v)
    return next(known for known in config_for(CONFIGS, q.device) if by_hand or isinstance(known, Config))
