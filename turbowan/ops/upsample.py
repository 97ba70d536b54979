"""Nearest upsampling of the VAE's frames, on the way from one convolution to the next. Channels last."""

import torch
from torch import Tensor

from .causal_input import add_up
from .registry import Operation
from .triton import offer


def _eager(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, first: Tensor | None, per_frame: int
) -> Tensor:
    total = add_up(x, bias, residual)
    out = total.unflatten(-1, (per_frame, -1)).movedim(-2, 2).flatten(1, 2)
    if first is not None:
        out = torch.cat([first, out], dim=1)
    return out.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def _fake(x: Tensor, bias: Tensor | None, residual: Tensor | None, first: Tensor | None, per_frame: int) -> Tensor:
    batch, frames, height, width, channels = x.shape
    frames = per_frame * frames + (0 if first is None else first.shape[1])
    return x.new_empty(batch, frames, 2 * height, 2 * width, channels // per_frame)


_operation = Operation("upsample", _eager, _fake)
offer(_operation, "upsample", "upsample")


def upsample(
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    first: Tensor | None = None,
    per_frame: int = 1,
) -> Tensor:
    """x + bias + residual at twice the height and width, every value four times; summed in float32, rounded once.

    Args:
        x: [B, T, H, W, P * C]. bias: [P * C]. residual: as x, with T frames.
        first: [B, F, H, W, C], frames to be put before them.
        per_frame: P, how many frames lie side by side in a frame's channels.

    Returns:
        [B, F + P * T, 2 H, 2 W, C].
    """
    return _operation(x, bias, residual, first, per_frame)  # type: ignore[no-any-return]
