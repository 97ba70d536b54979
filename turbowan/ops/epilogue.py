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


def check_product(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    scales: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    """Raise RequestError where a scaled product's tensors do not go together; kernels read by these shapes.

    Args:
        scales: the shapes that both scales must have.
    """
    check_activation(activation)
    if codes.ndim != 2 or weight.ndim != 2 or codes.shape[1] != weight.shape[1]:
        raise RequestError(
            f"a product takes rows [M, K] and a weight [N, K], got {list(codes.shape)} and {list(weight.shape)}"
        )
    if (tuple(scale.shape), tuple(weight_scale.shape)) != scales:
        wanted, got = (" and ".join(str(list(x)) for x in pair) for pair in (scales, (scale.shape, weight_scale.shape)))
        raise RequestError(f"scales of rows and weight must be {wanted} here, got {got}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise RequestError(f"the bias must be [{weight.shape[0]}] as the weight has rows, got {list(bias.shape)}")


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
