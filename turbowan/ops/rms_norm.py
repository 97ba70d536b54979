"""Root-mean-square normalisation over the last axis."""

import torch
from torch import Tensor

from .registry import Operation
from .triton import offer


def _eager(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


_operation = Operation("rms_norm", _eager, _fake)
offer(_operation, "rms_norm", "rms_norm")


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 and rounded once to x's dtype.

    Args:
        x: [..., D]. weight: [D].
    """
    return _operation(x, weight, eps)
