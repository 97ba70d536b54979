"""Layer normalisation, exact or with the variance of the official fast kernel.

The official fast kernel pads each row with zeros to the next power of two N2 and counts those zeros in the variance,
which adds (N2 - N) / N * mean^2. Widths that are no power of two (1536, 5120) therefore look different in official
pictures; `variance="official"` reproduces them.
"""

import torch
from torch import Tensor

from ..errors import RequestError
from .registry import Operation

VARIANCES = ("exact", "official")


def _eager(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, variance: str) -> Tensor:
    wide = x.float()
    mean = wide.mean(dim=-1, keepdim=True)
    centred = wide - mean
    var = centred.square().mean(dim=-1, keepdim=True)
    if variance == "official":
        width = x.shape[-1]
        var = var + ((1 << (width - 1).bit_length()) - width) / width * mean.square()
    out = centred * torch.rsqrt(var + eps)
    if weight is not None:
        out = out * weight.float()
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, variance: str) -> Tensor:
    return torch.empty_like(x)


_operation = Operation("layer_norm", _eager, _fake)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    variance: str = "exact",
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, in float32, rounded once to x's dtype.

    Args:
        x: [..., D]. weight, bias: [D] or None.
        variance: "exact", or "official" for the fast kernel's.

    Raises:
        RequestError: unknown variance.
    """
    if variance not in VARIANCES:
        raise RequestError(f"norms must be one of {', '.join(VARIANCES)}, got '{variance}'")
    return _operation(x, weight, bias, eps, variance)
