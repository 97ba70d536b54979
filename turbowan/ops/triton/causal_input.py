"""The input of a causal convolution in one pass: every value is read once and written once."""

# mypy: disable-error-code="assignment"
from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .approximate import power_of_two, reciprocal
from .rounding import PER_THREAD, config_for, narrowed, widened


@dataclass(frozen=True)
class Config:
    """warps: of a program. unroll: 16-byte loads of a thread under way in each part of the channels."""

    warps: int = 4
    unroll: int = 1


CONFIGS = {(8, 0): Config(), (9, 0): Config()}


def candidates() -> list[Config]:
    """What the sweep tries."""
    return [Config(warps, unroll) for warps in (2, 4, 8) for unroll in (1, 2)]


def parts_of(channels: int, config: Config) -> tuple[int, int]:
    """Widths of a power of two that the channels are made of (96 = 3 * 32), and how many positions fill a program."""
    chunk = channels & -channels
    return chunk, max(1, config.warps * 32 * PER_THREAD * config.unroll // chunk)


def causal_input(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    past: Tensor | None,
    silu: bool,
    lookback: int,
    frames: int,
    keep: bool,
    margin: int,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """The operation `causal_input`."""
    config = config or config_for(CONFIGS, x.device)
    batch, frames_x, height, width, channels = x.shape
    x, bias, residual, gamma, past = (None if t is None else t.contiguous() for t in (x, bias, residual, gamma, past))
    assert x is not None
    out = x.new_empty((batch, lookback + frames, height, width + 2 * margin, channels))
    total = x.new_empty(x.shape if keep else (0,))
    chunk, rows = parts_of(channels, config)
    grid = (triton.cdiv(height * (width + 2 * margin), rows), lookback + frames, batch)
    _causal_kernel[grid](
        x, bias, residual, gamma, past, out, total if keep else None,
        height, width, frames_x, 1 if residual is None else residual.shape[1], frames, channels**0.5,
        CHANNELS=channels, CHUNK=chunk, ROWS=rows, LOOKBACK=lookback, SILU=silu, MARGIN=margin,
        num_warps=config.warps,
    )  # fmt: skip
    return out, total


@triton.jit
def load_sum(x, bias, residual, place, column, there):
    """Of [positions, channels] x + bias + residual, added in float32 and rounded to x's dtype.

    The bias is read as often as x, from the cache: else it changes threads through shared memory.
    """
    part = tl.load(x + place, mask=there, other=0.0, eviction_policy="evict_first")
    if bias is not None or residual is not None:
        wide = widened(part)
        if bias is not None:
            wide += widened(tl.load(tl.broadcast_to((bias + column)[None, :], place.shape)))
        if residual is not None:
            wide += widened(tl.load(residual + place, mask=there, other=0.0, eviction_policy="evict_first"))
        part = narrowed(wide, x.dtype.element_ty)
    return part


@triton.jit
def _causal_kernel(
    x, bias, residual, gamma, past, out, total, height, width, frames_x, frames_residual, frames, root,
    CHANNELS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, LOOKBACK: tl.constexpr, SILU: tl.constexpr,
    MARGIN: tl.constexpr,
):  # fmt: skip
    """ROWS positions of one frame of the result, its margins among them."""
    COUNT: tl.constexpr = CHANNELS // CHUNK
    frame, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, CHUNK)
    to = position[:, None] * CHANNELS + lane[None, :]
    positions = height * (width + 2 * MARGIN)
    writes = position[:, None] < positions
    there, place = writes, to
    if MARGIN:
        row, column = position // (width + 2 * MARGIN), position % (width + 2 * MARGIN) - MARGIN
        there = writes & (column >= 0)[:, None] & (column < width)[:, None]
        place = (row * width + column)[:, None] * CHANNELS + lane[None, :]
    size = height * width * CHANNELS  # of a frame
    out += (sample * (frames + LOOKBACK) + frame) * (positions * CHANNELS)
    if frame < LOOKBACK:
        for i in tl.static_range(COUNT):
            if past is not None:
                before = past + (sample * LOOKBACK + frame) * size + i * CHUNK
                part = tl.load(before + place, mask=there, other=0.0, eviction_policy="evict_first")
            else:
                part = tl.zeros([ROWS, CHUNK], x.dtype.element_ty)
            tl.store(out + i * CHUNK + to, part, mask=writes)
    else:
        frame -= LOOKBACK
        source = tl.minimum(frame, frames_x - 1)
        x += (sample * frames_x + source) * size
        if residual is not None:
            residual += (sample * frames_residual + tl.minimum(source, frames_residual - 1)) * size
        if total is not None:
            total += (sample * frames_x + source) * size
        unrepeated = there & (position < tl.where(frame == source, positions, 0))[:, None]
        parts = ()
        squares = tl.zeros([ROWS], tl.float32)
        for i in tl.static_range(COUNT):
            added = None if residual is None else residual + i * CHUNK
            part = load_sum(x + i * CHUNK, bias, added, place, i * CHUNK + lane, there)
            if total is not None:
                tl.store(total + i * CHUNK + place, part, mask=unrepeated)
            if MARGIN:  # there the bias is added to nothing
                part = tl.where(there, part, 0.0).to(part.dtype)
            if gamma is None:
                tl.store(out + i * CHUNK + to, part, mask=writes)
            else:
                wide = widened(part)
                squares += tl.sum(wide * wide, axis=1)
                parts = parts + (part,)
        if gamma is not None:
            inverse = root / tl.maximum(tl.sqrt(squares), 1e-12)
            for i in tl.static_range(COUNT):
                factor = tl.load(tl.broadcast_to((gamma + i * CHUNK + lane)[None, :], place.shape))
                wide = widened(parts[i]) * inverse[:, None] * widened(factor)
                if SILU:
                    wide = wide * reciprocal(1.0 + power_of_two(wide * -1.4426950408889634))
                tl.store(out + i * CHUNK + to, narrowed(wide, x.dtype.element_ty), mask=writes)
