"""What the elementwise kernels share: how a program holds a whole row, and how numbers are rounded.

A program keeps its row in registers as a tuple of chunks, each as wide as its threads load at once (16 bytes of
bfloat16 a thread): 1536, 5120 and 13824 columns are 3, 5 and 7 such chunks, where a single tensor would be padded to
2048, 8192 and 16384. Codes are those of the eager twins, division included.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

from typing import TypeVar

import torch
import triton
import triton.language as tl

from . import INTERPRETED

PER_THREAD = 8  # elements of a chunk
COMPILED = tl.constexpr(not INTERPRETED)  # the interpreter knows no inline assembly
_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves the nearest integer, half to even, in the low bits
CODES = {"int8_row": torch.int8, "int8_block": torch.int8, "fp8_row": torch.float8_e4m3fn}  # else the input's dtype
T = TypeVar("T")


def warps_for(width: int) -> int:
    """The most warps, up to 8, that leave less than 5 % of a program's registers to columns past the end."""
    fits = (warps for warps in (8, 4, 2) if -width % chunk_of(warps) < 0.05 * width)
    return next(fits, 1)


def chunk_of(warps: int) -> int:
    """Columns of a chunk."""
    return warps * 32 * PER_THREAD


def slab_of(warps: int, block: int) -> int:
    """Rows of a block of block x block that are loaded at once."""
    return min(block, chunk_of(warps) // block)


def config_for(table: dict[tuple[int, int], T], device: torch.device) -> T:
    """The entry of the highest capability that the device has; of the lowest one, under the interpreter."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return table[max((known for known in table if known <= capability), default=min(table))]


def has_fp8(device: torch.device) -> bool:
    """Whether a kernel can round to e4m3 there; the interpreter does it wrong."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def columns(i: tl.constexpr, CHUNK: tl.constexpr):
    """Column numbers of chunk i."""
    return i * CHUNK + tl.arange(0, CHUNK)


@triton.jit
def load_columns(x, column, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """x[column]; WHOLE says that all are below WIDTH, else those that are not give 0."""
    if WHOLE:
        return tl.load(x + column)
    else:
        return tl.load(x + column, mask=column < WIDTH, other=0.0)


@triton.jit
def load_row(x, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """A row that is read once, as chunks in its own dtype; zeros past its end."""
    parts = ()
    for i in tl.static_range((WIDTH + CHUNK - 1) // CHUNK):
        column = columns(i, CHUNK)
        if (i + 1) * CHUNK <= WIDTH:
            part = tl.load(x + column, eviction_policy="evict_first")
        else:
            part = tl.load(x + column, mask=column < WIDTH, other=0.0, eviction_policy="evict_first")
        parts = parts + (part,)
    return parts


@triton.jit
def store_part(x, part, i: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk i of a row."""
    column = columns(i, CHUNK)
    if (i + 1) * CHUNK <= WIDTH:
        tl.store(x + column, part)
    else:
        tl.store(x + column, part, mask=column < WIDTH)


@triton.jit
def store_row(row, scale, parts, WIDTH: tl.constexpr, CHUNK: tl.constexpr, FORMAT: tl.constexpr):
    """Chunks in their own dtype, zeros past the end, to a row of a format ("bf16", "int8_row", "fp8_row") and its
    scale."""
    COUNT: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    if FORMAT == "bf16":
        for i in tl.static_range(COUNT):
            store_part(row, parts[i], i, WIDTH, CHUNK)
    else:
        largest = tl.abs(parts[0])
        for i in tl.static_range(1, COUNT):
            largest = _larger(largest, parts[i])
        top = tl.maximum(_largest(widened(largest)), 1e-5, propagate_nan=tl.PropagateNan.ALL)
        step = tl.div_rn(top, 127.0 if FORMAT == "int8_row" else 448.0)
        tl.store(scale, step)
        inverse = tl.div_rn(1.0, step)
        if FORMAT == "int8_row" and parts[0].dtype == tl.bfloat16:
            inverse = _factor(top, step, inverse)
            for i in tl.static_range(COUNT):
                store_part(row, _low_byte(tl.fma(widened(parts[i]), inverse, _NEAREST)), i, WIDTH, CHUNK)
        else:
            for i in tl.static_range(COUNT):
                ratio = quotient(widened(parts[i]), step, inverse)
                if FORMAT == "int8_row":
                    store_part(row, _integers(ratio), i, WIDTH, CHUNK)
                else:
                    store_part(row, ratio.to(tl.float8e4nv), i, WIDTH, CHUNK)


@triton.jit
def block_scale(parts):
    """Of a block, as parts of it in their own dtype, zeros outside: what makes it codes, and its scale."""
    largest = tl.abs(parts[0])
    for i in tl.static_range(1, len(parts)):
        largest = _larger(largest, parts[i])
    top = tl.maximum(_largest(widened(largest)), 1e-8, propagate_nan=tl.PropagateNan.ALL)
    return tl.div_rn(128.0, top), top / 128.0


@triton.jit
def block_codes(part, factor):
    """int8 codes of a part of a block."""
    return _integers(tl.minimum(widened(part) * factor, 127.0))


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """float32 as its nearest number of dtype. Two at a time where that has 16 bits: the conversion of a single number
    runs at an eighth of the arithmetic's rate on sm90. Opaque: else a product and a sum become one fma in 16 bits."""
    if COMPILED and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif COMPILED and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return x.to(dtype)


@triton.jit
def widened(x):
    """x in float32; of two bfloat16 in a register, which Triton takes apart first, with one instruction each."""
    if COMPILED and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 as its nearest number of dtype, in float32."""
    return widened(narrowed(x, dtype))


@triton.jit
def _larger(x, y):
    """The larger one of x >= 0 and |y|, or NaN; two at a time where they are bfloat16."""
    if COMPILED and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 size; and.b32 size, $2, 0x7fff7fff; max.NaN.bf16x2 $0, $1, size; }",
            "=r,r,r",
            [x, y],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.maximum(x, tl.abs(y), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(x):
    """The maximum of numbers >= 0, by their bits: the order is the same, and puts NaN on top."""
    bits = x.to(tl.int32, bitcast=True)
    if len(x.shape) == 2:
        bits = tl.max(bits, axis=1)
    return tl.max(bits, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def quotient(x, divisor, inverse):
    """x / divisor as IEEE division rounds it, from the rounded 1 / divisor: one step of Newton's (Markstein, 1990)."""
    near = x * inverse
    return tl.fma(tl.fma(-near, divisor, x), inverse, near)


@triton.jit
def _factor(top, step, inverse):
    """1 / step, turned by as little as makes x times it, not rounded before the integer is taken, the integer nearest
    to x / step as IEEE division rounds that; for a step of top / 127, top and every |x| <= top in bfloat16.

    Quotients of such numbers lie on halves or further from them than 20 units in the last place of the factor. On
    halves lies top / 2 (and others, if step is a power of two; then nothing need be turned): it decides.
    """
    half = 0.5 * top
    wanted = quotient(half, step, inverse) + _NEAREST
    found = tl.fma(half, inverse, _NEAREST)
    bits = inverse.to(tl.int32, bitcast=True)
    return tl.where(found < wanted, bits + 2, tl.where(found > wanted, bits - 2, bits)).to(tl.float32, bitcast=True)


@triton.jit
def _integers(x):
    """Round to int8, half to even; |x| < 2^22."""
    return _low_byte(x + _NEAREST)


@triton.jit
def integers_away(x):
    """Round to int8, half away from zero, with what float32 holds next below a half; |x| < 2^21."""
    return _low_byte(tl.fma(x, 1.0 + 2**-23, _NEAREST))


@triton.jit
def _low_byte(x):
    """Of a float32's bits, as int8."""
    return x.to(tl.int32, bitcast=True).to(tl.int8)
