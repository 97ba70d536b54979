"""8-bit float (e4m3) linear layers with one scale per row: weights one per output row, activations one per token.

Both scales are amax / 448, the largest number of e4m3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .epilogue import activate, check_product, finish, product_fake, product_flops
from .int8_blockwise import FLOATS
from .int8_rowwise import exact_ratio
from .registry import Constraints, Implementation, Operation
from .triton import offer

LARGEST = 448.0


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    scale = exact_ratio(x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5), LARGEST)
    return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).contiguous(), scale


def _quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _product(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
) -> Tensor:
    return finish(codes.float() @ weight.float().T * scale * weight_scale, bias, dtype, activation)


def _scaled_mm(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
    fast: bool = True,
) -> Tensor:
    """By `torch._scaled_mm`, which writes bfloat16 only, takes a bias in bfloat16 (another is rounded at each call) and
    widths in multiples of 16 (others are padded).

    fast: sums stay in the tensor cores' own accumulators, of fewer bits than float32.
    """
    if dtype != torch.bfloat16:
        return _product(codes, scale, weight, weight_scale, bias, dtype, activation)
    n, k = weight.shape
    if n % 16 or k % 16:
        more = (0, -k % 16)
        codes = F.pad(codes.view(torch.int8), more).view(codes.dtype)
        weight = F.pad(weight.view(torch.int8), (*more, 0, -n % 16)).view(weight.dtype)
        weight_scale = F.pad(weight_scale, (0, -n % 16))
        bias = None if bias is None else F.pad(bias, (0, -n % 16))
    out = torch._scaled_mm(
        codes.contiguous(),
        weight.contiguous().T,
        scale.contiguous(),
        weight_scale.view(1, -1),
        None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=fast,
    )[:, :n].contiguous()
    return activate(out, activation)


_quantize_operation = Operation("quantize_fp8_rowwise", _quantize, _quantize_fake, gradient=False)
_product_operation = Operation(
    "product_fp8_rowwise", _product, product_fake, product_flops, gradient=False, reads=torch.float8_e4m3fn
)


def quantize_fp8_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] -> float8_e4m3fn [M, K] and float32 scales [M, 1] (amax / 448, round to nearest even)."""
    return _quantize_operation(x)


def product_fp8_rowwise(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
) -> Tensor:
    """Rows already in float8 times W^T, scaled, + bias.

    Args:
        codes: float8_e4m3fn [M, K]. scale: float32 [M, 1]. weight: float8_e4m3fn [N, K].
        weight_scale: float32 [N] or [N, 1]. bias: [N] or None. dtype: of the result.
        activation: "none", or "gelu_tanh" of the rounded result.

    Returns:
        [M, N] in `dtype`, rounded once, after the bias. By `torch._scaled_mm` the bias is rounded to bfloat16 before
        it is added, and GELU is a pass of its own.

    Raises:
        RequestError: no such activation, or shapes that do not go together.
    """
    weight_scale = weight_scale.flatten()
    check_product(codes, scale, weight, weight_scale, bias, activation, ((codes.shape[0], 1), (weight.shape[0],)))
    return _product_operation(codes, scale, weight, weight_scale, bias, dtype, activation)


def linear_fp8_rowwise(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias in float8 with a scale per token and per output row.

    Args:
        x: [M, K]. weight: float8_e4m3fn [N, K]. weight_scale: float32 [N] or [N, 1]. bias: [N] or None.

    Returns:
        [M, N] in x's dtype, rounded as `product_fp8_rowwise` rounds.

    Raises:
        RequestError: shapes that do not go together.
    """
    return product_fp8_rowwise(*quantize_fp8_rowwise(x), weight, weight_scale, bias, x.dtype)


FLOAT8 = (torch.float8_e4m3fn,)
# e4m3 tensor cores exist from 8.9 on. PyTorch's row-scaled product serves 8.9 and 9.0 from 2.7 on (its pull request
# 144348), was mended for 10.x after 2.8 (160693), and fails on 12.0 in 2.10 (issue 192707). We ran it on 9.0 with 2.11.
_SCALED_MM = Constraints(
    ("cuda",), FLOAT8, min_capability=(8, 9), torch_from={(8, 9): "2.7", (10, 0): "2.10", (12, 0): None}
)
_product_operation.add(Implementation("scaled_mm", _scaled_mm, _SCALED_MM, priority=1))
offer(_quantize_operation, "quantize", "quantize_fp8_rowwise", dtypes=FLOATS, min_capability=(8, 9))
