"""Rounding to 8 bits in one pass over the tensor, with the codes of the eager twins bit for bit."""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..int8_blockwise import BLOCK
from .rounding import CODES, block_codes, block_scale, chunk_of, load_row, slab_of, store_row, warps_for

BLOCK_WARPS = 8


def candidates() -> list[int]:
    """Warps that a sweep tries for a row's program and for a block's."""
    return [2, 4, 8, 16]


@triton.jit
def _row_kernel(x, codes, scale, stride, WIDTH: tl.constexpr, CHUNK: tl.constexpr, FORMAT: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    parts = load_row(x + row * stride, WIDTH, CHUNK)
    store_row(codes + row * WIDTH, scale + row, parts, WIDTH, CHUNK, FORMAT)


@triton.jit
def _block_kernel(x, codes, scale, M, K, stride, BLOCK: tl.constexpr, SLAB: tl.constexpr):
    """One block of BLOCK x BLOCK, SLAB rows at a time."""
    index = tl.program_id(0)
    across = tl.cdiv(K, BLOCK)
    row = ((index // across) * BLOCK + tl.arange(0, SLAB)).to(tl.int64)[:, None]
    column = ((index % across) * BLOCK + tl.arange(0, BLOCK))[None, :]
    x += row * stride + column
    parts = ()
    for i in tl.static_range(0, BLOCK, SLAB):
        parts = parts + (tl.load(x + i * stride, mask=(row + i < M) & (column < K), other=0.0),)
    factor, found = block_scale(parts)
    codes += row * K + column
    for i in tl.static_range(BLOCK // SLAB):
        at = i * SLAB
        tl.store(codes + at * K, block_codes(parts[i], factor), mask=(row + at < M) & (column < K))
    tl.store(scale + index, found)


def quantize_int8_rowwise(x: Tensor, num_warps: int | None = None) -> tuple[Tensor, Tensor]:
    """[M, K] -> int8 [M, K], float32 [M, 1]."""
    return _rows(x, "int8_row", num_warps)


def quantize_fp8_rowwise(x: Tensor, num_warps: int | None = None) -> tuple[Tensor, Tensor]:
    """[M, K] -> float8_e4m3fn [M, K], float32 [M, 1]. Triton's interpreter truncates the smallest numbers."""
    return _rows(x, "fp8_row", num_warps)


def _rows(x: Tensor, format: str, num_warps: int | None) -> tuple[Tensor, Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    m, k = x.shape
    codes = torch.empty((m, k), dtype=CODES[format], device=x.device)
    scale = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    warps = num_warps or warps_for(k)
    if m > 0:
        _row_kernel[(m,)](x, codes, scale, x.stride(0), k, chunk_of(warps), format, num_warps=warps)
    return codes, scale


def quantize_int8_blockwise(x: Tensor, num_warps: int | None = None) -> tuple[Tensor, Tensor]:
    """[M, K] -> int8 [M, K], float32 [ceil(M / 128), ceil(K / 128)]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    m, k = x.shape
    codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scale = torch.empty((triton.cdiv(m, BLOCK), triton.cdiv(k, BLOCK)), dtype=torch.float32, device=x.device)
    if m > 0:
        warps = num_warps or BLOCK_WARPS
        slab = slab_of(warps, BLOCK)
        _block_kernel[(scale.numel(),)](x, codes, scale, m, k, x.stride(0), BLOCK, slab, num_warps=warps)
    return codes, scale
