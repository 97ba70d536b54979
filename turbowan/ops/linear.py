"""Linear layers in 16 or 32 bits, with the activation that follows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .epilogue import activate, check_activation
from .registry import Constraints, Implementation, Operation


def _eager(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return activate(F.linear(x, weight, bias), activation)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * x[0] * weight[0] * weight[1]


def _by_cublaslt(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """GELU, in the same tanh form, in the product's epilogue: of the sum in float32, before it is rounded."""
    if activation == "gelu_tanh" and bias is not None:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return _eager(x, weight, bias, activation)


_operation = Operation("linear", _eager, _fake, _flops)
_operation.add(
    Implementation("cublaslt", _by_cublaslt, Constraints(("cuda",), (torch.bfloat16, torch.float16)), priority=1)
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """x W^T + bias in x's dtype, and an activation.

    The eager twin rounds the sum to x's dtype before the activation. On a CUDA device in 16 bits, and with a bias, GELU
    works on the sum in float32, in the product's epilogue (cuBLASLt): one rounding less.

    Args:
        x: [..., K]. weight: [N, K]. bias: [N]. activation: "none" or "gelu_tanh".

    Returns:
        [..., N].

    Raises:
        RequestError: unknown activation.
    """
    check_activation(activation)
    return _operation(x.reshape(-1, x.shape[-1]), weight, bias, activation).view(*x.shape[:-1], -1)
