"""What follows a scaled product: the bias, one rounding, an activation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RequestError

ACTIVATIONS = ("none", "gelu_tanh")


def check_activation(activation: str) -> None:
    """Raise RequestError where no kernel knows this activation."""
    if activation not in ACTIVATIONS:
        raise RequestError(f"activations of a product are {', '.join(ACTIVATIONS)}; got '{activation}'")


def finish(product: Tensor, bias: Tensor | None, dtype: torch.dtype, activation: str) -> Tensor:
    """float32 [M, N] -> [M, N] in `dtype`: rounded once, after the bias; the activation works on what was rounded."""
    return activate((product if bias is None else product + bias.float()).to(dtype), activation)


def activate(x: Tensor, activation: str) -> Tensor:
    """One of ACTIVATIONS, of numbers of any shape, in their dtype."""
    return F.gelu(x, approximate="tanh") if activation == "gelu_tanh" else x


def product_fake(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
) -> Tensor:
    """[M, N] for codes [M, K] and weight [N, K]."""
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=dtype)


def product_flops(codes: torch.Size, scale: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """Multiply-adds times two, from the shapes of codes [M, K] and weight [N, K]."""
    return 2 * codes[0] * weight[0] * weight[1]
