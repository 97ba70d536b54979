"""GELU and rounding to 8 bits in one pass: by whole rows, or by blocks of 128 x 128."""

# mypy: disable-error-code="assignment"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp8_rowwise import quantize_fp8_rowwise
from ..int8_blockwise import BLOCK
from .approximate import power_of_two, reciprocal
from .rounding import (
    CODES,
    block_codes,
    block_scale,
    chunk_of,
    config_for,
    has_fp8,
    load_row,
    narrowed,
    slab_of,
    store_row,
    warps_for,
    widened,
)


@dataclass(frozen=True)
class Config:
    """warps: of a row's program; 0 = by the width. block_warps: of a block's."""

    warps: int = 0
    block_warps: int = 8


CONFIGS = {
    (8, 0): Config(),  # not measured
    (9, 0): Config(block_warps=16),
    (10, 0): Config(block_warps=16),  # not measured
    (12, 0): Config(),  # not measured
}


def candidates() -> list[Config]:
    """What the sweep tries."""
    return [Config(), Config(4, 4), Config(16, 16), Config(2, 32)]


def gelu_rows(x: Tensor, format: str, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """The operation `gelu_rows`."""
    if format == "fp8_row" and not has_fp8(x.device):
        return quantize_fp8_rowwise(gelu_rows(x, "bf16", config)[0])
    x = x if x.stride(-1) == 1 else x.contiguous()
    config = config or config_for(CONFIGS, x.device)
    batch, length, width = x.shape
    per_block = format == "int8_block"
    blocks = triton.cdiv(length, BLOCK)
    padded = blocks * BLOCK if per_block and batch > 1 else length
    shape = (batch * blocks, triton.cdiv(width, BLOCK)) if per_block else (batch * length, 1)
    rows = x.new_empty((batch * padded, width), dtype=CODES.get(format, x.dtype))
    scale = x.new_empty(0) if format == "bf16" else x.new_empty(shape, dtype=torch.float32)
    if per_block:
        _block_kernel[(triton.cdiv(width, BLOCK), blocks, batch)](
            x, rows, scale, length, padded, x.stride(0), x.stride(1), WIDTH=width, BLOCK=BLOCK,
            SLAB=slab_of(config.block_warps, BLOCK), num_warps=config.block_warps,
        )  # fmt: skip
    else:
        warps = config.warps or warps_for(width)
        _row_kernel[(length, batch)](
            x, rows, scale, x.stride(0), x.stride(1), WIDTH=width, CHUNK=chunk_of(warps), FORMAT=format,
            num_warps=warps,
        )  # fmt: skip
    return rows, scale


@triton.jit
def _gelu(x):
    """x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3): GELU's tanh form without its cancellation."""
    exponent = x * (-2.302208198 - 0.1029432397 * (x * x))  # -2 log2(e) u
    return x * reciprocal(1.0 + power_of_two(exponent))


@triton.jit
def _row_kernel(
    x, rows, scale, stride_b, stride_l, WIDTH: tl.constexpr, CHUNK: tl.constexpr, FORMAT: tl.constexpr
):
    """One row."""
    dtype: tl.constexpr = x.dtype.element_ty
    row, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dense = sample * tl.num_programs(0) + row
    parts = load_row(x + sample * stride_b + row * stride_l, WIDTH, CHUNK)
    outs = ()
    for i in tl.static_range((WIDTH + CHUNK - 1) // CHUNK):
        outs = outs + (narrowed(_gelu(widened(parts[i])), dtype),)
    store_row(rows + dense * WIDTH, scale + dense, outs, WIDTH, CHUNK, FORMAT)


@triton.jit
def _block_kernel(
    x, codes, scale, length, padded, stride_b, stride_l, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SLAB: tl.constexpr
):
    """One block of BLOCK x BLOCK, SLAB rows at a time; rows from `length` up to `padded` become zeros."""
    sample = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(1) * BLOCK + tl.arange(0, SLAB)).to(tl.int64)[:, None]
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    x += sample * stride_b + row * stride_l + column
    parts = ()
    for i in tl.static_range(0, BLOCK, SLAB):
        inside = (row + i < length) & (column < WIDTH)
        parts = parts + (tl.load(x + i * stride_l, mask=inside, other=0.0, eviction_policy="evict_first"),)
    outs = ()
    for i in tl.static_range(BLOCK // SLAB):
        outs = outs + (narrowed(_gelu(widened(parts[i])), x.dtype.element_ty),)
    factor, found = block_scale(outs)
    codes += (sample * padded + row) * WIDTH + column
    for i in tl.static_range(BLOCK // SLAB):
        inside = (row + i * SLAB < padded) & (column < WIDTH)
        tl.store(codes + i * SLAB * WIDTH, block_codes(outs[i], factor), mask=inside)
    index = (sample * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(scale + index, found)
