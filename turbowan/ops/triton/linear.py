"""Linear layers in 16 bits on Hopper, by the kernel of `hopper_matmul.py`."""

from torch import Tensor

from ..linear import in_plain_pytorch
from .hopper import HAS_GLUON
from .matmul_int8 import HopperConfig, describable

FEWEST_ROWS = 4096  # below, its tiles of 128 x 256 leave too many of the processors idle; not measured


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, config: HopperConfig | None = None
) -> Tensor:
    """As the eager twin, which takes over few rows, and what the copy engine cannot read or write."""
    x, weight = x.contiguous(), weight.contiguous()
    if not HAS_GLUON or x.dtype != weight.dtype or (config is None and len(x) < FEWEST_ROWS):
        return in_plain_pytorch(x, weight, bias, activation)
    out = x.new_empty(len(x), len(weight))
    if not all(map(describable, (x, weight, out))):
        return in_plain_pytorch(x, weight, bias, activation)
    from .hopper_matmul import product

    product(False, x, None, weight, None, bias, out, activation == "gelu_tanh", config or HopperConfig(group=16))
    return out
