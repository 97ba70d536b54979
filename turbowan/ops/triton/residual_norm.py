"""Residual, LayerNorm, modulation and rounding to 8 bits in one pass over whole rows.

With a scale per 128 x 128 block, whose maximum no single row knows, in two: the first leaves each row's mean and
deviation, the second normalises block by block.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp8_rowwise import quantize_fp8_rowwise
from ..int8_blockwise import BLOCK
from .rounding import (
    CODES,
    COMPILED,
    block_codes,
    block_scale,
    chunk_of,
    columns,
    config_for,
    has_fp8,
    load_columns,
    load_row,
    narrowed,
    rounded,
    slab_of,
    store_part,
    store_row,
    warps_for,
    widened,
)


@dataclass(frozen=True)
class Config:
    """warps: of a row's program; 0 = by the width. block_warps: of a block's. block_registers: of its
    threads, at most."""

    warps: int = 0
    block_warps: int = 16
    block_registers: int = 64


CONFIGS = {
    (8, 0): Config(),  # not measured
    (9, 0): Config(block_warps=8, block_registers=80),
    (10, 0): Config(block_warps=8, block_registers=80),  # not measured
    (12, 0): Config(),  # not measured
}


def candidates() -> list[Config]:
    """What the sweep tries."""
    return [Config(), Config(1, 16), Config(2, 32), Config(8, 8, 80)]


def residual_norm(
    x: Tensor,
    delta: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    variance: str,
    format: str,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operation `residual_norm`."""
    x = _gapless(x)
    delta, gate, weight, bias, shift, scale = (
        None if given is None else _gapless(given) for given in (delta, gate, weight, bias, shift, scale)
    )
    batch, length, width = x.shape
    if format == "fp8_row" and not has_fp8(x.device):
        x_new, rows, _ = residual_norm(x, delta, gate, weight, bias, shift, scale, eps, variance, "bf16", config)
        return x_new, *quantize_fp8_rowwise(rows)
    config = config or config_for(CONFIGS, x.device)
    warps = config.warps or warps_for(width)
    per_block = format == "int8_block"
    blocks = triton.cdiv(length, BLOCK)
    padded = blocks * BLOCK if per_block and batch > 1 else length
    shape = (batch * blocks, triton.cdiv(width, BLOCK)) if per_block else (batch * length, 1)
    x_new = x.new_empty(0 if delta is None else x.shape)
    rows = x.new_empty((batch * padded, width), dtype=CODES.get(format, x.dtype))
    row_scale = x.new_empty(0) if format == "bf16" else x.new_empty(shape, dtype=torch.float32)
    mean, deviation = x.new_empty((2, batch * length if per_block else 0), dtype=torch.float32)
    vectors = (weight, bias, shift, scale, _stride(shift, 0), _stride(scale, 0))
    _row_kernel[(length, batch)](
        x, delta, gate, *vectors, x_new, rows, row_scale, mean, deviation,
        x.stride(0), x.stride(1), _stride(delta, 0), _stride(delta, 1), _stride(gate, 0), eps,
        WIDTH=width, CHUNK=chunk_of(warps), FORMAT=format,
        OFFICIAL=_padding(width) if variance == "official" else 0, num_warps=warps,
    )  # fmt: skip
    if per_block:
        source = x if delta is None else x_new
        _block_kernel[(triton.cdiv(width, BLOCK), blocks, batch)](
            source, mean, deviation, *vectors, rows, row_scale,
            length, padded, source.stride(0), source.stride(1), WIDTH=width, BLOCK=BLOCK,
            SLAB=slab_of(config.block_warps, BLOCK), num_warps=config.block_warps,
            maxnreg=config.block_registers,
        )  # fmt: skip
    return x_new, rows, row_scale


def _padding(width: int) -> int:
    """How many zeros the official fast kernel counts in the variance."""
    return (1 << (width - 1).bit_length()) - width


def _gapless(x: Tensor) -> Tensor:
    """Rows and samples may be any strides apart, the numbers of a row may not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _stride(x: Tensor | None, axis: int) -> int:
    """0 where there is one only, which then serves all."""
    return 0 if x is None or x.shape[axis] == 1 else x.stride(axis)


@triton.jit
def _row_kernel(
    x, delta, gate, weight, bias, shift, scale, stride_shift, stride_scale, x_new, rows, row_scale, means, deviations,
    stride_xb, stride_xl, stride_db, stride_dl, stride_gate, eps,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, FORMAT: tl.constexpr, OFFICIAL: tl.constexpr,
):  # fmt: skip
    """One row. For "int8_block" it leaves its mean and deviation, 1 / sqrt(variance + eps), instead of codes."""
    COUNT: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    dtype: tl.constexpr = x.dtype.element_ty
    row, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dense = sample * tl.num_programs(0) + row  # in what is written
    parts = load_row(x + sample * stride_xb + row * stride_xl, WIDTH, CHUNK)
    if delta is not None:
        changes = load_row(delta + sample * stride_db + row * stride_dl, WIDTH, CHUNK)
        sums = ()
        for i in tl.static_range(COUNT):
            change = widened(changes[i])
            if gate is not None:
                factor = load_columns(gate + sample * stride_gate, columns(i, CHUNK), WIDTH, (i + 1) * CHUNK <= WIDTH)
                # `rounded` is opaque: left to itself the compiler makes one fma of product and sum in bfloat16
                change = rounded(change * factor.to(dtype).to(tl.float32), dtype)
            sums = sums + (narrowed(widened(parts[i]) + change, dtype),)
        parts = sums
        for i in tl.static_range(COUNT):
            store_part(x_new + dense * WIDTH, parts[i], i, WIDTH, CHUNK)

    total = widened(parts[0])
    for i in tl.static_range(1, COUNT):
        total += widened(parts[i])
    mean = _average(tl.sum(total, axis=0), WIDTH)
    total = tl.zeros([CHUNK], tl.float32)
    for i in tl.static_range(COUNT):
        centred = widened(parts[i]) - mean
        if (i + 1) * CHUNK > WIDTH:
            centred = tl.where(columns(i, CHUNK) < WIDTH, centred, 0.0)
        total += centred * centred
    variance = _average(tl.sum(total, axis=0), WIDTH)
    if OFFICIAL > 0:
        variance += OFFICIAL / WIDTH * mean * mean
    deviation = tl.rsqrt(variance + eps)

    if FORMAT == "int8_block":
        tl.store(means + dense, mean)
        tl.store(deviations + dense, deviation)
    else:
        shift_row = None if shift is None else shift + sample * stride_shift
        scale_row = None if scale is None else scale + sample * stride_scale
        outs = ()
        for i in tl.static_range(COUNT):
            column = columns(i, CHUNK)
            out = _normalise(
                widened(parts[i]), mean, deviation, weight, bias, shift_row, scale_row,
                column, WIDTH, (i + 1) * CHUNK <= WIDTH, dtype,
            )  # fmt: skip
            if (i + 1) * CHUNK > WIDTH:
                out = tl.where(column < WIDTH, out, tl.zeros_like(out))
            outs = outs + (out,)
        store_row(rows + dense * WIDTH, row_scale + dense, outs, WIDTH, CHUNK, FORMAT)


@triton.jit
def _average(total, WIDTH: tl.constexpr):
    """total / WIDTH, rounded as it is stored for blocks: left to itself, the assembler makes one fma of it and the
    subtraction from x where nothing else needs it, and codes of blocks then differ from those of the rows."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [total, 1.0 / WIDTH], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return total / WIDTH


@triton.jit
def _normalise(
    x, mean, deviation, weight, bias, shift, scale, column, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """LayerNorm rounded to dtype, then modulation, rounded again."""
    out = (x - mean) * deviation
    if weight is not None:
        out = out * load_columns(weight, column, WIDTH, WHOLE).to(tl.float32)
    if bias is not None:
        out = out + load_columns(bias, column, WIDTH, WHOLE).to(tl.float32)
    out = narrowed(out, dtype)
    if scale is not None:
        factor = 1.0 + load_columns(scale, column, WIDTH, WHOLE)
        out = narrowed(widened(out) * factor + load_columns(shift, column, WIDTH, WHOLE), dtype)
    return out


@triton.jit
def _block_kernel(
    x, means, deviations, weight, bias, shift, scale, stride_shift, stride_scale, codes, block_scales,
    length, padded, stride_xb, stride_xl, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SLAB: tl.constexpr,
):  # fmt: skip
    """One block of BLOCK x BLOCK, SLAB rows at a time; rows from `length` up to `padded` become zeros."""
    WHOLE: tl.constexpr = WIDTH % BLOCK == 0
    sample = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(1) * BLOCK + tl.arange(0, SLAB)).to(tl.int64)[:, None]
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    shift_row = None if shift is None else shift + sample * stride_shift
    scale_row = None if scale is None else scale + sample * stride_scale
    parts, outs = (), ()
    for i in tl.static_range(0, BLOCK, SLAB):  # the last row again and again past the end: the maximum stays
        at = x + sample * stride_xb + tl.minimum(row + i, length - 1) * stride_xl + column
        parts = parts + (tl.load(at, mask=column < WIDTH, other=0.0, eviction_policy="evict_first"),)
    for i in tl.static_range(BLOCK // SLAB):
        at = sample * length + tl.minimum(row + i * SLAB, length - 1)
        out = _normalise(
            widened(parts[i]), tl.load(means + at), tl.load(deviations + at), weight, bias, shift_row, scale_row,
            column, WIDTH, WHOLE, x.dtype.element_ty,
        )  # fmt: skip
        if not WHOLE:
            out = tl.where(column < WIDTH, out, tl.zeros_like(out))
        outs = outs + (out,)
    factor, found = block_scale(outs)
    codes += (sample * padded + row) * WIDTH + column
    for i in tl.static_range(BLOCK // SLAB):
        at = row + i * SLAB
        kept = block_codes(outs[i], tl.where(at < length, factor, 0.0))
        tl.store(codes + i * SLAB * WIDTH, kept, mask=(at < padded) & (column < WIDTH))
    index = (sample * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(block_scales + index, found)
