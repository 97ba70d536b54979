"""RMSNorm over the full width, rotation of every head and block means, of q and k at once.

A program walks down a unit of rows that divides a block, so that it alone adds up what it writes; the next rows are on
their way to shared memory while one is worked on.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rms_norm import root_mean_square
from .rounding import (
    COMPILED,
    PER_THREAD,
    columns,
    config_for,
    load_columns,
    load_row,
    narrowed,
    rounded,
    store_part,
    warps_for,
    widened,
)


@dataclass(frozen=True)
class Config:
    """unit: rows of a program, at most; where q's and k's units differ, their stages do not share memory. warps: of a
    program; 0 = by the width. registers: of a thread, at most; 128 let four programs of four warps share a
    multiprocessor. stages: rows under way, the one at work among them. per_thread: columns a thread loads at once.
    """

    unit: int = 64
    warps: int = 0
    registers: int = 128
    stages: int = 3
    per_thread: int = PER_THREAD


CONFIGS = {
    (8, 0): Config(),  # not measured
    (9, 0): Config(128, stages=2),
    (10, 0): Config(128, stages=2),  # not measured
    (12, 0): Config(),  # not measured
}


def candidates() -> list[Config]:
    """What the sweep tries."""
    narrow = [Config(64, 8, most, 3, 4) for most in (64, 80)]
    return [*(Config(stages=stages) for stages in (1, 2, 3, 4)), Config(128, stages=2), Config(128), *narrow]


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    block_q: int,
    block_k: int,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operation `qk_norm_rope`."""
    q, k = (x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous() for x in (q, k))
    config = config or config_for(CONFIGS, q.device)
    batch, length, heads, size = q.shape
    warps = config.warps or warps_for(heads * size)
    units = gcd(config.unit, block_q), gcd(config.unit, block_k)
    outs = [q.new_empty(q.shape) for _ in range(2)]
    sums = [
        q.new_empty((batch, heads, triton.cdiv(length, rows), size) if block else 0, dtype=torch.float32)
        for rows, block in zip(units, (block_q, block_k), strict=True)
    ]
    _unit_kernel[(triton.cdiv(length, min(units)), batch, 2)](
        q, k, weight_q.contiguous(), weight_k.contiguous(), cos.contiguous(), sin.contiguous(), *outs, *sums,
        length, q.stride(0), q.stride(1), k.stride(0), k.stride(1), eps,
        HEADS=heads, SIZE=size, CHUNK=warps * 32 * config.per_thread, UNIT_Q=units[0], UNIT_K=units[1],
        BLOCK_Q=block_q, BLOCK_K=block_k, STAGES=config.stages, num_warps=warps, maxnreg=config.registers,
    )  # fmt: skip
    means = [_means(*which, length) for which in zip(sums, units, (block_q, block_k), strict=True)]
    return outs[0], outs[1], means[0], means[1]


def _means(sums: Tensor, unit: int, block: int, length: int) -> Tensor:
    """Sums of units [B, H, U, D] to means of blocks; where they are the same, the first kernel has divided."""
    if block in (0, unit):
        return sums
    batch, heads, units, size = sums.shape
    blocks = triton.cdiv(length, block)
    means = sums.new_empty(batch, heads, blocks, size)
    _mean_kernel[(blocks, batch * heads)](
        sums, means, length, units, SIZE=size, UNIT=unit, BLOCK=block, num_warps=1
    )  # fmt: skip
    return means


@triton.jit
def _unit_kernel(
    q, k, weight_q, weight_k, cos, sin, q_out, k_out, q_sums, k_sums,
    length, stride_qb, stride_ql, stride_kb, stride_kl, eps,
    HEADS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, UNIT_Q: tl.constexpr, UNIT_K: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A unit of rows of q or of k."""
    sample = tl.program_id(1).to(tl.int64)
    if tl.program_id(2) == 0:
        if tl.program_id(0) * UNIT_Q < length:  # k may have more units, or q
            _unit(
                q + sample * stride_qb, stride_ql, weight_q, cos, sin, q_out, q_sums, length, eps,
                HEADS, SIZE, CHUNK, UNIT_Q, BLOCK_Q, STAGES,
            )  # fmt: skip
    else:
        if tl.program_id(0) * UNIT_K < length:
            _unit(
                k + sample * stride_kb, stride_kl, weight_k, cos, sin, k_out, k_sums, length, eps,
                HEADS, SIZE, CHUNK, UNIT_K, BLOCK_K, STAGES,
            )  # fmt: skip


@triton.jit
def _unit(
    x, stride, weight, cos, sin, out, sums, length, eps,
    HEADS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Rows `UNIT * program` and on of the sample that starts at x. BLOCK: rows of a mean, 0 = none wanted."""
    WIDTH: tl.constexpr = HEADS * SIZE
    COUNT: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    dtype: tl.constexpr = x.dtype.element_ty
    sample, units = tl.program_id(1).to(tl.int64), tl.cdiv(length, UNIT)
    first = tl.program_id(0).to(tl.int64) * UNIT
    rows = tl.minimum(length - first, UNIT).to(tl.int32)
    x += first * stride
    out += (sample * length + first) * WIDTH
    cos += first * (SIZE // 2)
    sin += first * (SIZE // 2)
    pair = tl.arange(0, CHUNK // 2) % (SIZE // 2)  # the same for every chunk: whole heads
    factors, totals = (), ()  # totals: sums over the rows
    for i in tl.static_range(COUNT):
        factors = factors + (load_columns(weight, columns(i, CHUNK), WIDTH, (i + 1) * CHUNK <= WIDTH),)
        totals = totals + (tl.zeros([CHUNK], tl.float32),)

    for row in tl.range(0, rows, num_stages=STAGES):
        parts = load_row(x + row * stride, WIDTH, CHUNK)
        c = tl.load(cos + row * (SIZE // 2) + pair)
        s = tl.load(sin + row * (SIZE // 2) + pair)
        inverse = root_mean_square(parts, eps, WIDTH)
        more = ()
        for i in tl.static_range(COUNT):
            normed = rounded(widened(parts[i]) * inverse * _widened_here(factors[i]), dtype)
            even, odd = tl.split(tl.reshape(normed, [CHUNK // 2, 2]))
            turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [CHUNK])
            turned = narrowed(turned, dtype)
            store_part(out + row * WIDTH, turned, i, WIDTH, CHUNK)
            if BLOCK > 0:
                more = more + (totals[i] + widened(turned),)
        if BLOCK > 0:
            totals = more

    if BLOCK > 0:
        for i in tl.static_range(COUNT):
            total = totals[i] / (rows if BLOCK == UNIT else 1)
            column = columns(i, CHUNK)
            place = ((sample * HEADS + column // SIZE) * units + tl.program_id(0)) * SIZE + column % SIZE
            if (i + 1) * CHUNK <= WIDTH:
                tl.store(sums + place, total)
            else:
                tl.store(sums + place, total, mask=column < WIDTH)


@triton.jit
def _widened_here(x):
    """x in float32, where it is asked for: left to itself the compiler does it before the loop, and keeps registers
    twice as wide over it."""
    if COMPILED and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=False, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def _mean_kernel(sums, means, length, units, SIZE: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one head: the sum of its units over its number of rows."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for j in tl.static_range(BLOCK // UNIT):
        unit = block * (BLOCK // UNIT) + j
        there = column < tl.where(unit < units, SIZE, 0)
        total += tl.load(sums + (head * units + unit) * SIZE + column, mask=there, other=0.0)
    count = tl.minimum(length - block * BLOCK, BLOCK)
    tl.store(means + (head * tl.num_programs(0) + block) * SIZE + column, total / count)
