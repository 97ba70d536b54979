"""Nearest upsampling: a program reads its positions once and writes each of them four times."""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .causal_input import Config, load_sum, parts_of
from .rounding import config_for

CONFIGS = {(8, 0): Config(), (9, 0): Config()}


def candidates() -> list[Config]:
    """What the sweep tries."""
    return [Config(warps, unroll) for warps in (2, 4, 8) for unroll in (1, 2)]


def upsample(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    first: Tensor | None,
    per_frame: int,
    config: Config | None = None,
) -> Tensor:
    """The operation `upsample`."""
    config = config or config_for(CONFIGS, x.device)
    batch, frames, height, width, channels = x.shape
    channels //= per_frame
    before = 0 if first is None else first.shape[1]
    out = x.new_empty((batch, before + per_frame * frames, 2 * height, 2 * width, channels))
    chunk, rows = parts_of(channels, config)
    given = [(first, None, None, 1, 0)] if first is not None else []
    for part, shift, added, side_by_side, start in [*given, (x, bias, residual, per_frame, before)]:
        part, shift, added = (None if t is None else t.contiguous() for t in (part, shift, added))
        assert part is not None
        _upsample_kernel[(triton.cdiv(height * width, rows), part.shape[1] * side_by_side, batch)](
            part, shift, added, out, width, height * width, part.shape[1], out.shape[1], start,
            CHANNELS=channels, CHUNK=chunk, ROWS=rows, PER_FRAME=side_by_side, num_warps=config.warps,
        )  # fmt: skip
    return out


@triton.jit
def _upsample_kernel(
    x, bias, residual, out, width, positions, frames_x, frames_out, start,
    CHANNELS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, PER_FRAME: tl.constexpr,
):  # fmt: skip
    """ROWS positions of one frame."""
    frame, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    source, beside = frame // PER_FRAME, (frame % PER_FRAME) * CHANNELS
    position = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    there = position < positions
    lane = tl.arange(0, CHUNK)
    size = positions * CHANNELS
    read = position * (CHANNELS * PER_FRAME) + lane[None, :]
    row = position // width
    corner = (2 * position + row * 2 * width) * CHANNELS + lane[None, :]  # row 2 h, column 2 w of 2 width
    x += (sample * frames_x + source) * size * PER_FRAME
    if residual is not None:
        residual += (sample * frames_x + source) * size * PER_FRAME
    out += (sample * frames_out + start + frame) * size * 4
    for i in tl.static_range(CHANNELS // CHUNK):
        added = None if residual is None else residual + beside + i * CHUNK
        part = load_sum(x + beside + i * CHUNK, bias, added, read, beside + i * CHUNK + lane, there)
        for dy in tl.static_range(2):
            for dx in tl.static_range(2):
                tl.store(out + i * CHUNK + (dy * 2 * width + dx) * CHANNELS + corner, part, mask=there)
