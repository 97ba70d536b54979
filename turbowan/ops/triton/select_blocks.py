"""The key blocks of every query block, found on the GPU: block means, their products, and the largest of each row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_map import kept_blocks

LONGEST_ROW = 8192  # key blocks that one program sorts out; PyTorch's sort takes longer rows
_TILE = 64  # query and key blocks per program of the product


@triton.jit
def less_mean(x, mean, D: tl.constexpr):
    """x [M, D] less one head's mean, both rounded to x's dtype."""
    mean = tl.load(mean + tl.arange(0, D)).to(x.dtype).to(tl.float32)
    return (x.to(tl.float32) - mean[None, :]).to(x.dtype)


@triton.jit(do_not_specialize=["length"])
def _block_means(
    x,
    shift,
    means,
    length,
    heads,
    stride_b,
    stride_l,
    stride_h,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, D)
    at = rows.to(tl.int64)[:, None] * stride_l + columns[None, :]
    x += (head // heads) * stride_b + (head % heads) * stride_h
    inside = (rows < length)[:, None]
    tile = tl.load(x + at, mask=inside, other=0.0)
    if SHIFTED:
        tile = tl.where(inside, less_mean(tile, shift + head * D, D), 0.0)
    tile = tile.to(tl.float32)
    count = tl.minimum(length - block * BLOCK, BLOCK).to(tl.float32)
    tl.store(means + (head * tl.num_programs(0) + block) * D + columns, tl.sum(tile, axis=0) / count)


@triton.jit(do_not_specialize=["blocks", "length"])
def _token_means(means, out, blocks, length, BLOCK: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr):
    """The mean over all tokens of each head, from its blocks' means."""
    head = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((64, COLUMNS), dtype=tl.float32)
    for start in tl.range(0, blocks, 64, loop_unroll_factor=4):  # so many loads at once
        rows = start + tl.arange(0, 64)
        at = (head * blocks + rows[:, None]) * D + columns[None, :]
        count = tl.minimum(length - rows * BLOCK, BLOCK).to(tl.float32)
        total += tl.load(means + at, mask=(rows < blocks)[:, None], other=0.0) * count[:, None]
    tl.store(out + head * D + columns, tl.sum(total, axis=0) / length)


@triton.jit
def _keys(x):
    """float32, rounded to bfloat16 (half to even), as integers in the same order; minus zero counts as zero."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    bits = tl.where(bits == -32768, 0, bits)
    return (bits ^ ((bits >> 31) & 0x7FFF)).to(tl.int16)


@triton.jit(do_not_specialize=["q_blocks", "k_blocks"])
def _score(
    q_means,
    k_means,
    k_mean,
    keys,
    q_blocks,
    k_blocks,
    TILE: tl.constexpr,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    head = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    others = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.arange(0, D)
    q_at = (head * q_blocks + rows[:, None]) * D + columns[None, :]
    k_at = (head * k_blocks + others[:, None]) * D + columns[None, :]
    q = tl.load(q_means + q_at, mask=(rows < q_blocks)[:, None], other=0.0)
    k = tl.load(k_means + k_at, mask=(others < k_blocks)[:, None], other=0.0)
    if SHIFTED:
        k -= tl.load(k_mean + head * D + columns)[None, :]
    scores = tl.dot(q.to(tl.bfloat16).to(DTYPE), tl.trans(k.to(tl.bfloat16).to(DTYPE)))
    at = (head * q_blocks + rows[:, None]) * k_blocks + others[None, :]
    tl.store(keys + at, _keys(scores), mask=(rows < q_blocks)[:, None] & (others < k_blocks)[None, :])


@triton.jit(do_not_specialize=["k_blocks", "kept"])
def _largest(keys, lists, k_blocks, kept, WIDTH: tl.constexpr):
    """One row: the kept-th largest key by bisection over its 16 bits, then all above it and the first of its equals."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    key = tl.load(keys + row * k_blocks + columns, mask=columns < k_blocks, other=0).to(tl.int32)
    key = tl.where(columns < k_blocks, key, -32769)
    bound = -32768
    for bit in tl.static_range(15, -1, -1):
        higher = bound + (1 << bit)
        bound = tl.where(tl.sum((key >= higher).to(tl.int32), axis=0) >= kept, higher, bound)
    above = (key > bound).to(tl.int32)
    equal = (key == bound).to(tl.int32)
    wanted = kept - tl.sum(above, axis=0)
    chosen = above | (equal & (tl.cumsum(equal, axis=0) <= wanted).to(tl.int32))
    tl.store(lists + row * kept + tl.cumsum(chosen, axis=0) - 1, columns, mask=chosen > 0)


def block_means(x: Tensor, block: int, mean: Tensor | None = None) -> Tensor:
    """[B, L, H, D] -> float32 [B, H, ceil(L / block), D]; a short last block is averaged over its true rows.

    mean: float32 [B, H, D], taken off every token first, both rounded to x's dtype.
    """
    batch, length, heads, size = x.shape
    blocks = triton.cdiv(length, block)
    means = x.new_empty((batch, heads, blocks, size), dtype=torch.float32)
    grid = (blocks, batch * heads)
    _block_means[grid](
        x, mean, means, length, heads, *x.stride()[:3], block, size, mean is not None, num_warps=4
    )  # fmt: skip
    return means


def token_means(means: Tensor, length: int, block: int) -> Tensor:
    """The mean over all tokens: float32 [B, H, N, D] of block means -> [B, H, D]."""
    batch, heads, blocks, size = means.shape
    out = means.new_empty((batch, heads, size), dtype=torch.float32)
    _token_means[(size // 16, batch * heads)](means, out, blocks, length, block, size, 16, num_warps=4)
    return out


def select_blocks(q_means: Tensor, k_means: Tensor, k_mean: Tensor | None, topk_ratio: float) -> Tensor:
    """The kept key blocks of every query block, as `block_map` chooses them.

    Args:
        q_means, k_means: float32 [B, H, Nq, D] and [B, H, Nk, D]. k_mean: float32 [B, H, D], over all
            tokens, or None where it is off already.

    Returns:
        int32 [B, H, Nq, kept], ascending.
    """
    batch, heads, q_blocks, size = q_means.shape
    k_blocks = k_means.shape[2]
    kept = kept_blocks(topk_ratio, k_blocks)
    keys = q_means.new_empty((batch, heads, q_blocks, k_blocks), dtype=torch.int16)
    dtype = tl.bfloat16 if keys.is_cuda else tl.float32  # Triton's interpreter multiplies bfloat16 wrongly
    shifted = k_mean is not None
    grid = (triton.cdiv(k_blocks, _TILE), triton.cdiv(q_blocks, _TILE), batch * heads)
    _score[grid](q_means, k_means, k_mean, keys, q_blocks, k_blocks, _TILE, size, dtype, shifted, num_warps=4)
    if k_blocks > LONGEST_ROW:
        return largest_by_sorting(keys, kept)
    lists = keys.new_empty((batch, heads, q_blocks, kept), dtype=torch.int32)
    width = max(32, triton.next_power_of_2(k_blocks))
    _largest[(batch * heads * q_blocks,)](keys, lists, k_blocks, kept, width, num_warps=max(1, width // 1024))
    return lists


def largest_by_sorting(keys: Tensor, kept: int) -> Tensor:
    """The same by PyTorch's stable sort, for rows of any length."""
    order = keys.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    return order.sort(dim=-1).values.to(torch.int32)
