"""What a causal convolution of the VAE reads: a sum, normed, with SiLU, after the frames before it. Channels last."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Operation
from .triton import offer


def add_up(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x + bias + residual in float32, rounded once; a residual of fewer frames repeats its last one."""
    if bias is None and residual is None:
        return x
    wide = widened(x) if bias is None else widened(x) + widened(bias)
    if residual is not None:
        wide = wide + widened(repeat_last(residual, x.shape[1]))
    return wide.to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """In float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def repeat_last(x: Tensor, frames: int) -> Tensor:
    """[B, T, ...] as a clip of so many frames, T or more."""
    missing = frames - x.shape[1]
    return torch.cat([x, x[:, -1:].expand(-1, missing, *x.shape[2:])], dim=1) if missing else x


def _eager(
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
) -> tuple[Tensor, Tensor]:
    total = add_up(x, bias, residual)
    out = total
    if gamma is not None:
        wide = widened(total)
        length = wide.square().sum(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)
        wide = wide * (x.shape[-1] ** 0.5 / length) * widened(gamma)
        out = (F.silu(wide) if silu else wide).to(x.dtype)
    if past is None:
        past = x.new_zeros(x.shape[0], lookback, *x.shape[2:])
    out = torch.cat([past, repeat_last(out, frames)], dim=1)
    if margin:
        out = F.pad(out, (0, 0, margin, margin))
    return out, total.clone() if keep else x.new_empty(0)


def _fake(
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
) -> tuple[Tensor, Tensor]:
    batch, _, height, width, channels = x.shape
    out = x.new_empty(batch, lookback + frames, height, width + 2 * margin, channels)
    return out, x.new_empty(x.shape if keep else 0)


_operation = Operation("causal_input", _eager, _fake)
offer(_operation, "causal_input", "causal_input")


def causal_input(
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    past: Tensor | None = None,
    silu: bool = False,
    lookback: int = 2,
    frames: int = 0,
    keep: bool = False,
    margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """Frames before, then SiLU(norm(x + bias + residual) * gamma), the norm over channels as in `channel_norm`.

    Computed in float32; the sum is rounded to x's dtype, and so is the result.

    Args:
        x: [B, T, H, W, C], a convolution's result without its bias. bias, gamma: [C]; without gamma there is neither
            norm nor SiLU. residual: [B, up to T, H, W, C]; its last frame is repeated.
        past: [B, lookback, H, W, C], the frames before; None: zeros.
        frames: how many to make of the T, the last one repeated; 0 = T.
        keep: whether the sum is wanted too. margin: columns of zeros on the left and on the right of each frame.

    Returns:
        [B, lookback + frames, H, margin + W + margin, C], and the sum [B, T, H, W, C] (empty unless kept).
    """
    return _operation(x, bias, residual, gamma, past, silu, lookback, frames or x.shape[1], keep, margin)  # type: ignore[no-any-return]
