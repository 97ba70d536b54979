"""The linear branch of sparse-linear attention: what all keys leave behind, and what a query block takes from it.

The branch is proj(phi(q) (sum phi(k)^T v) / (1e-5 + phi(q) . sum phi(k))), phi the softmax over a head. Both sums, the
*state*, are one pass over k and v: a program adds up a fixed chunk of tokens, a second kernel adds the chunks in order
(so that runs repeat bit for bit) and multiplies by the projection, which a query then need not do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .approximate import power_of_two, reciprocal
from .online_softmax import LOG2_E, can_describe, load_rows, rows_of
from .rounding import PER_THREAD, config_for

EPSILON = 1e-5
_LOG2_E = tl.constexpr(LOG2_E)


@dataclass(frozen=True)
class Config:
    """programs: about as many as run at once, for a sample's heads together; each leaves 64 kB of partial sums at a
    head size of 128, so no more. tile: tokens of a step. warps, stages: of a program. registers: of a thread, at most;
    with 128 two programs of 8 warps share a multiprocessor, and one works where the other waits. descriptors: whether
    Hopper's copy engine loads (never where strides forbid it)."""

    programs: int
    tile: int = 64
    warps: int = 8
    stages: int = 3
    registers: int = 128
    descriptors: bool = True


CONFIGS = {
    (8, 0): Config(216, 32, descriptors=False),  # not measured
    (9, 0): Config(264),
    (10, 0): Config(296),  # not measured
    (12, 0): Config(188, 32),  # 99 kB a program; not measured
}


def candidates() -> list[Config]:
    """What the sweep tries."""
    tiles = [(64, 3), (64, 2), (32, 4)]
    copied = [Config(programs, tile, stages=stages) for programs in (264, 528) for tile, stages in tiles]
    return [*copied, Config(264, descriptors=False), Config(264, 32, stages=4, descriptors=False)]


@triton.jit
def _feature_map(x, inside=None):
    """Softmax over the last axis, in float32; zeros in rows that are not `inside`."""
    x = x.to(tl.float32)
    p = power_of_two(x * _LOG2_E - (tl.max(x, axis=1) * _LOG2_E)[:, None])
    inverse = reciprocal(tl.sum(p, axis=1))
    if inside is not None:
        inverse = tl.where(inside, inverse, 0.0)
    return p * inverse[:, None]


@triton.jit(do_not_specialize=["length", "tiles"])
def _partial_sums(
    k,
    v,
    products,
    sums,
    length,
    tiles,
    k_stride_l,
    k_stride_h,
    v_stride_l,
    v_stride_h,
    TILE: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """v^T phi(k) and the sum of phi(k) over `tiles` tiles of one head. A thread holds SHARE tokens of a tile."""
    head, chunk = tl.program_id(0), tl.program_id(1)  # neighbours read what lies side by side
    first = chunk * tiles * TILE
    product = tl.zeros((D, D), dtype=tl.float32)
    features = tl.zeros((TILE // SHARE, D), dtype=tl.float32)  # summed over its rows after the loop
    for start in tl.range(first, tl.minimum(first + tiles * TILE, length), TILE, num_stages=STAGES):
        keys = load_rows(k, start, head * k_stride_h, length, k_stride_l, TILE, D, DESCRIPTORS)
        values = load_rows(v, start, head * v_stride_h, length, v_stride_l, TILE, D, DESCRIPTORS)
        phi = _feature_map(keys, start + tl.arange(0, TILE) < length)
        features += tl.sum(tl.reshape(phi, (SHARE, TILE // SHARE, D)), axis=0)
        product = tl.dot(tl.trans(values), phi.to(values.dtype), product)
    columns = tl.arange(0, D)
    part = (head * tl.num_programs(1) + chunk).to(tl.int64)
    tl.store(products + part * D * D + columns[:, None] * D + columns[None, :], product)
    tl.store(sums + part * D + columns, tl.sum(features, axis=0))


@triton.jit(do_not_specialize=["chunks"])
def _fold(
    products,
    sums,
    weight,
    folded,
    key_sums,
    chunks,
    scale,
    weight_stride_out,
    weight_stride_in,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    state = tl.zeros((ROWS, D), dtype=tl.float32)
    key_sum = tl.zeros((ROWS,), dtype=tl.float32)
    for chunk in tl.range(0, chunks, loop_unroll_factor=4):  # so many loads at once
        part = head * chunks + chunk
        state += tl.load(products + part * D * D + columns[None, :] * D + rows[:, None])
        key_sum += tl.load(sums + part * D + rows)
    turned = tl.load(weight + columns[None, :] * weight_stride_out + columns[:, None] * weight_stride_in)
    turned = turned.to(folded.dtype.element_ty).to(tl.float32)
    out = tl.dot(state * scale, turned)
    tl.store(folded + head * D * D + rows[:, None] * D + columns[None, :], out.to(folded.dtype.element_ty))
    tl.store(key_sums + head * D + rows, key_sum * scale)


def linear_state(
    k: Tensor, v: Tensor, proj_weight: Tensor, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """What the linear branch needs of all keys and values, times D / L (so that it fits float16 at any length).

    Args:
        k, v: [B, L, H, D], last axis contiguous. proj_weight: [D, D] as in `nn.Linear`.

    Returns:
        (sum phi(k)^T v) proj_weight^T in k's dtype [B, H, D, D]; sum phi(k) in float32 [B, H, D].
    """
    config = config or config_for(CONFIGS, k.device)
    batch, length, heads, size = k.shape
    tiles = triton.cdiv(triton.cdiv(length, config.tile), max(1, config.programs // heads))  # of a program
    chunks = triton.cdiv(length, tiles * config.tile)
    products = k.new_empty((batch, heads, chunks, size, size), dtype=torch.float32)
    sums = k.new_empty((batch, heads, chunks, size), dtype=torch.float32)
    share = max(1, config.tile * size // (config.warps * 32 * PER_THREAD))
    descriptors = config.descriptors and can_describe(k, v)
    for b in range(batch):  # a sample's rows end where a descriptor ends
        _partial_sums[(heads, chunks)](
            rows_of(k[b], config.tile, size, descriptors), rows_of(v[b], config.tile, size, descriptors),
            products[b], sums[b], length, tiles, *k.stride()[1:3], *v.stride()[1:3],
            TILE=config.tile, SHARE=share, D=size, DESCRIPTORS=descriptors, STAGES=config.stages,
            num_warps=config.warps, maxnreg=config.registers,
        )  # fmt: skip
    folded = k.new_empty((batch, heads, size, size), dtype=k.dtype)
    key_sums = k.new_empty((batch, heads, size), dtype=torch.float32)
    _fold[(size // 16, batch * heads)](
        products, sums, proj_weight, folded, key_sums, chunks, size / length, *proj_weight.stride(), 16, size,
        num_warps=4,
    )  # fmt: skip
    return folded, key_sums


@triton.jit
def add_linear_branch(result, q, folded, key_sums, bias, epsilon, D: tl.constexpr):
    """result [M, D] plus the branch of its queries, in float32, from one head's state; `epsilon` is EPSILON * D / L."""
    columns = tl.arange(0, D)
    phi = _feature_map(q)
    weight = tl.sum(phi * tl.load(key_sums + columns)[None, :], axis=1) + epsilon
    state = tl.load(folded + columns[:, None] * D + columns[None, :])
    result += tl.load(bias + columns).to(state.dtype).to(tl.float32)[None, :]
    return tl.dot((phi * reciprocal(weight)[:, None]).to(state.dtype), state, result)


@triton.jit(do_not_specialize=["length"])
def _add_branch(
    sparse,
    q,
    out,
    folded,
    key_sums,
    bias,
    length,
    epsilon,
    sparse_stride_b,
    sparse_stride_l,
    sparse_stride_h,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (rows < length)[:, None]
    rows = rows.to(tl.int64)[:, None]
    columns = tl.arange(0, D)[None, :]
    at = sample * sparse_stride_b + head * sparse_stride_h + rows * sparse_stride_l + columns
    result = tl.load(sparse + at, mask=inside, other=0.0).to(tl.float32)
    at = sample * q_stride_b + head * q_stride_h + rows * q_stride_l + columns
    query = tl.load(q + at, mask=inside, other=0.0)
    state = sample * heads + head
    result = add_linear_branch(result, query, folded + state * D * D, key_sums + state * D, bias, epsilon, D)
    tl.store(out + ((sample * length + rows) * heads + head) * D + columns, result.to(query.dtype), mask=inside)


def add_branch(sparse: Tensor, q: Tensor, folded: Tensor, key_sums: Tensor, bias: Tensor) -> Tensor:
    """The sparse branch [B, L, H, D] plus the linear one of q [B, L, H, D], in q's dtype, contiguous."""
    batch, length, heads, size = q.shape
    out = q.new_empty(q.shape)
    grid = (triton.cdiv(length, 128), heads, batch)
    _add_branch[grid](
        sparse, q, out, folded, key_sums, bias, length, EPSILON * size / length,
        *sparse.stride()[:3], *q.stride()[:3], 128, size, num_warps=8,
    )  # fmt: skip
    return out
