"""Root-mean-square norm of whole rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rounding import chunk_of, columns, config_for, load_columns, load_row, store_part, warps_for, widened


@dataclass(frozen=True)
class Config:
    """warps: of a row's program; 0 = by the width."""

    warps: int = 0


CONFIGS = {
    (8, 0): Config(),  # not measured
    (9, 0): Config(),
    (10, 0): Config(),  # not measured
    (12, 0): Config(),  # not measured
}


def candidates() -> list[Config]:
    """What the sweep tries."""
    return [Config(warps) for warps in (0, 1, 2, 4, 8)]


def rms_norm(x: Tensor, weight: Tensor, eps: float, config: Config | None = None) -> Tensor:
    """The operation `rms_norm`. Any strides; only [B, L, D] with gapless rows is read without a copy."""
    width = x.shape[-1]
    rows = x if x.ndim == 3 and x.stride(-1) == 1 else x.reshape(1, -1, width).contiguous()
    out = x.new_empty(rows.shape)
    warps = (config or config_for(CONFIGS, x.device)).warps or warps_for(width)
    _row_kernel[(rows.shape[1], rows.shape[0])](
        rows, weight.contiguous(), out, rows.stride(0), rows.stride(1), eps,
        WIDTH=width, CHUNK=chunk_of(warps), num_warps=warps,
    )  # fmt: skip
    out = out.view(x.shape)
    promised = torch.empty_like(x)  # follows x's order of axes
    return out if promised.stride() == out.stride() else promised.copy_(out)


@triton.jit
def root_mean_square(parts, eps, WIDTH: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of a row in chunks, zeros past its end."""
    total = widened(parts[0]) * widened(parts[0])
    for i in tl.static_range(1, len(parts)):
        part = widened(parts[i])
        total += part * part
    return tl.rsqrt(tl.sum(total, axis=0) / WIDTH + eps)


@triton.jit
def _row_kernel(x, weight, out, stride_b, stride_l, eps, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """One row."""
    row, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    parts = load_row(x + sample * stride_b + row * stride_l, WIDTH, CHUNK)
    inverse = root_mean_square(parts, eps, WIDTH)
    for i in tl.static_range(len(parts)):
        factor = widened(load_columns(weight, columns(i, CHUNK), WIDTH, (i + 1) * CHUNK <= WIDTH))
        normed = (widened(parts[i]) * inverse * factor).to(x.dtype.element_ty)
        store_part(out + (sample * tl.num_programs(0) + row) * WIDTH, normed, i, WIDTH, CHUNK)
