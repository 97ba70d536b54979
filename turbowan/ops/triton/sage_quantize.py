"""What SageSLA multiplies: int8 codes of q and k with a scale per block, e4m3 codes of v with a scale per channel.

The tensor cores leave a thread other columns of q k^T than they want of the 8-bit probabilities. v's tokens are
therefore stored, 16 at a time, in the order in which threads hold their columns: no probability changes threads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rounding import integers_away, quotient
from .select_blocks import less_mean

V_RANGE = 2.25  # the largest |v| after scaling, as in the eager twin
_PAD = 128  # v's tokens are filled up with zeros to a multiple


@triton.jit
def to_e4m3(x, NATIVE: tl.constexpr):
    """float32 below 448 in size -> e4m3, half to even. Not native: the same values in float32 (Triton's interpreter
    rounds e4m3 otherwise)."""
    if NATIVE:
        out = x.to(tl.float8e4nv)
    else:
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        out = tl.where(tl.abs(x) < 2**-6, (x + 24576.0) - 24576.0, normal)  # steps of 2^-9
    return out


@triton.jit
def _token_at(place):
    """The token at a place of v's codes: of each 16, token 8 a + 2 t + b lies at 4 t + 2 a + b (a, b < 2, t < 4)."""
    return (place & -15) | ((place & 2) << 2) | ((place & 12) >> 1)


@triton.jit
def as_stored(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [ROWS, COLUMNS] with its columns in the order of v's tokens; in a product's own layout, nothing moves."""
    x = tl.reshape(x, (ROWS, COLUMNS // 16, 2, 4, 2))
    return tl.reshape(tl.permute(x, (0, 1, 3, 2, 4)), (ROWS, COLUMNS))


@triton.jit(do_not_specialize=["length"])
def _blocks(
    x, mean, codes, scales, length, heads, stride_b, stride_l, stride_h, BLOCK: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Codes are rounded half away from zero."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    rows = (block * BLOCK + tl.arange(0, BLOCK))[:, None]
    columns = tl.arange(0, D)
    x += (head // heads) * stride_b + (head % heads) * stride_h
    last = tl.minimum(rows, length - 1).to(tl.int64)  # again and again past the end: the maximum stays
    tile = tl.load(x + last * stride_l + columns[None, :])
    if mean is not None:
        tile = less_mean(tile, mean + head * D, D)
    tile = tile.to(tl.float32)
    scale = tl.div_rn(tl.max(tl.max(tl.abs(tile), axis=1), axis=0), 127.0) + 1e-7
    out = integers_away(quotient(tile, scale, tl.div_rn(1.0, scale)))
    at = (((head // heads) * length + rows) * heads + head % heads) * D + columns[None, :]
    tl.store(codes + at, out, mask=rows < length)
    tl.store(scales + head * tl.num_programs(0) + block, scale)


@triton.jit(do_not_specialize=["length"])
def _peaks(v, peaks, length, heads, stride_b, stride_l, stride_h, CHUNK: tl.constexpr, D: tl.constexpr):
    chunk = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, D)
    v += (head // heads) * stride_b + (head % heads) * stride_h
    peak = tl.zeros((64, D), dtype=tl.float32)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length), 64):
        rows = start + tl.arange(0, 64)
        at = rows.to(tl.int64)[:, None] * stride_l + columns[None, :]
        tile = tl.load(v + at, mask=(rows < length)[:, None], other=0.0)
        peak = tl.maximum(peak, tl.abs(tile.to(tl.float32)))
    tl.store(peaks + (head * tl.num_programs(0) + chunk) * D + columns, tl.max(peak, axis=0))


@triton.jit(do_not_specialize=["length"])
def _values(
    v,
    scales,
    codes,
    length,
    padded,
    heads,
    stride_b,
    stride_l,
    stride_h,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    NATIVE: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = _token_at(places)
    columns = tl.arange(0, D)
    v += (head // heads) * stride_b + (head % heads) * stride_h
    at = rows.to(tl.int64)[:, None] * stride_l + columns[None, :]
    tile = tl.load(v + at, mask=(rows < length)[:, None], other=0.0).to(tl.float32)
    scale = tl.load(scales + head * D + columns)
    out = to_e4m3(quotient(tile, scale[None, :], tl.div_rn(1.0, scale)[None, :]), NATIVE)
    tl.store(codes + (head * D + columns[:, None]) * padded + places[None, :], tl.trans(out))


def quantize_blocks(x: Tensor, mean: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """Queries, or keys less their mean over all tokens, both rounded to their dtype.

    Args:
        x: [B, L, H, D], last axis contiguous. mean: float32 [B, H, D].

    Returns:
        int8 [B, L, H, D], contiguous, and float32 scales [B, H, ceil(L / block)].
    """
    batch, length, heads, size = x.shape
    blocks = triton.cdiv(length, block)
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scales = x.new_empty((batch, heads, blocks), dtype=torch.float32)
    grid = (blocks, batch * heads)
    _blocks[grid](x, mean, codes, scales, length, heads, *x.stride()[:3], block, size, num_warps=block // 16)
    return codes, scales


def quantize_values(v: Tensor) -> tuple[Tensor, Tensor]:
    """v [B, L, H, D] -> e4m3 [B, H, D, padded L], tokens last as fp8 products on Hopper want them, in the order
    of `as_stored`, zero at the end (float32 with the same values on a CPU), and float32 scales [B, H, D]."""
    batch, length, heads, size = v.shape
    chunk = 512  # enough programs that the last ones to start do not count
    chunks = triton.cdiv(length, chunk)
    peaks = v.new_empty((batch, heads, chunks, size), dtype=torch.float32)
    _peaks[(chunks, batch * heads)](v, peaks, length, heads, *v.stride()[:3], chunk, size, num_warps=8)
    scales = peaks.amax(dim=2).clamp_(min=1e-12).div_(V_RANGE)
    padded = triton.cdiv(length, _PAD) * _PAD
    dtype = torch.float8_e4m3fn if v.is_cuda else torch.float32
    codes = v.new_empty((batch, heads, size, padded), dtype=dtype)
    rows = 64  # of a program: 128 leave a multiprocessor room for one only
    grid = (padded // rows, batch * heads)
    _values[grid](
        v, scales, codes, length, padded, heads, *v.stride()[:3], rows, size, v.is_cuda, num_warps=4
    )  # fmt: skip
    return codes, scales
