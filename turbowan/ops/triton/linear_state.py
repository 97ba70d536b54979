"""The linear branch of sparse-linear attention: what all keys leave behind, and what a query block takes from it.

The branch is proj(phi(q) (sum phi(k)^T v) / (1e-5 + phi(q) . sum phi(k))), phi the softmax over a head. Both sums, the
*state*, are one pass over k and v: a program adds up a fixed chunk of tokens, a second kernel adds the chunks in order
(so that runs repeat bit for bit) and multiplies by the projection, which a query then need not do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048  # tokens per program: 1 MB read per head of 128, against 64 kB of partial sums written
TILE = 64
EPSILON = 1e-5


@triton.jit
def _feature_map(x):
    """Softmax over the last axis, in float32."""
    x = x.to(tl.float32)
    p = tl.exp(x - tl.max(x, axis=1)[:, None])
    return p * (1 / tl.sum(p, axis=1))[:, None]


@triton.jit(do_not_specialize=["length"])
def _partial_sums(
    k,
    v,
    products,
    sums,
    length,
    heads,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    STAGES: tl.constexpr,
):
    chunk = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    first = chunk * CHUNK
    columns = tl.arange(0, D)
    k += (head // heads) * k_stride_b + (head % heads) * k_stride_h
    v += (head // heads) * v_stride_b + (head % heads) * v_stride_h
    product = tl.zeros((D, D), dtype=tl.float32)
    features = tl.zeros((TILE, D), dtype=tl.float32)  # summed over its rows after the loop
    for start in tl.range(first, tl.minimum(first + CHUNK, length), TILE, num_stages=STAGES):
        rows = start + tl.arange(0, TILE)
        inside = (rows < length)[:, None]
        rows = rows.to(tl.int64)[:, None]
        tile = tl.load(k + rows * k_stride_l + columns[None, :], mask=inside, other=0.0)
        values = tl.load(v + rows * v_stride_l + columns[None, :], mask=inside, other=0.0)
        phi = tl.where(inside, _feature_map(tile), 0.0).to(values.dtype)
        features += phi.to(tl.float32)
        product = tl.dot(tl.trans(phi), values, product)
    part = head * tl.num_programs(0) + chunk
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
    tile = rows[:, None] * D + columns[None, :]
    state = tl.zeros((ROWS, D), dtype=tl.float32)
    key_sum = tl.zeros((ROWS,), dtype=tl.float32)
    for chunk in tl.range(0, chunks, loop_unroll_factor=4):  # so many loads at once
        part = head * chunks + chunk
        state += tl.load(products + part * D * D + tile)
        key_sum += tl.load(sums + part * D + rows)
    turned = tl.load(weight + columns[None, :] * weight_stride_out + columns[:, None] * weight_stride_in)
    turned = turned.to(folded.dtype.element_ty).to(tl.float32)
    out = tl.dot(state * scale, turned)
    tl.store(folded + head * D * D + tile, out.to(folded.dtype.element_ty))
    tl.store(key_sums + head * D + rows, key_sum * scale)


def linear_state(k: Tensor, v: Tensor, proj_weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the linear branch needs of all keys and values, times D / L (so that it fits float16 at any length).

    Args:
        k, v: [B, L, H, D], last axis contiguous. proj_weight: [D, D] as in `nn.Linear`.

    Returns:
        (sum phi(k)^T v) proj_weight^T in k's dtype [B, H, D, D]; sum phi(k) in float32 [B, H, D].
    """
    batch, length, heads, size = k.shape
    chunks = triton.cdiv(length, CHUNK)
    products = k.new_empty((batch * heads, chunks, size, size), dtype=torch.float32)
    sums = k.new_empty((batch * heads, chunks, size), dtype=torch.float32)
    _partial_sums[(chunks, batch * heads)](
        k, v, products, sums, length, heads, *k.stride()[:3], *v.stride()[:3], CHUNK, TILE, size, 3, num_warps=8
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
    return tl.dot((phi / weight[:, None]).to(state.dtype), state, result)


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
