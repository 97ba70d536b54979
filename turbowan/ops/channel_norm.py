"""Root-mean-square norm over the channels of each position, and SiLU after it: the VAE's norm."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Operation


def _eager(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    length = x.square().sum(dim=1, keepdim=True, dtype=torch.float32).sqrt().clamp(min=1e-12)
    out = x * (gamma.shape[0] ** 0.5 / length).to(x.dtype)
    out *= gamma.to(x.dtype)  # in place: on a CPU large new memory takes longer than the arithmetic
    return F.silu(out, inplace=True) if silu else out


def _fake(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    return torch.empty_like(x)


_operation = Operation("channel_norm", _eager, _fake)


def channel_norm(x: Tensor, gamma: Tensor, silu: bool = False) -> Tensor:
    """x / |x| * sqrt(C) * gamma over axis 1, the length summed in float32; then SiLU if asked for.

    Args:
        x: [B, C, ...]. gamma: [C, 1, ...], broadcast against x.

    Returns:
        x's shape and dtype.
    """
    return _operation(x, gamma, silu)
