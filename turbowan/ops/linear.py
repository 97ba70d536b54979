"""Linear layers in 16 or 32 bits, with the activation that follows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .epilogue import check_activation
from .registry import Operation
from .triton import offer


def in_plain_pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The eager twin."""
    out = F.linear(x, weight, bias)
    return F.gelu(out, approximate="tanh") if activation == "gelu_tanh" else out


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * x[0] * weight[0] * weight[1]


_operation = Operation("linear", in_plain_pytorch, _fake, _flops)
offer(_operation, "linear", "linear", name="hopper", min_capability=(9, 0), max_capability=(9, 0), interpreted=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """x W^T + bias, rounded to x's dtype, and the activation of that, rounded again.

    Args:
        x: [..., K]. weight: [N, K]. bias: [N]. activation: "none" or "gelu_tanh".

    Returns:
        [..., N].

    Raises:
        RequestError: unknown activation.
    """
    check_activation(activation)
    return _operation(x.reshape(-1, x.shape[-1]), weight, bias, activation).view(*x.shape[:-1], -1)
