"""8-bit linear layers with one scale per 128 x 128 block, the format of TurboDiffusion's `-quant` files.

Source: `turbodiffusion/ops` (Apache-2.0). The scale is amax / 128, not / 127: +amax saturates to 127, -amax is -128.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .epilogue import check_product, finish, product_fake, product_flops
from .registry import Operation
from .triton import offer

BLOCK = 128
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _blocks(x: Tensor) -> Tensor:
    """[M, K] -> [m, 128, k, 128], zero-filled at the ends."""
    x = F.pad(x, (0, -x.shape[1] % BLOCK, 0, -x.shape[0] % BLOCK))
    return x.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    blocks = _blocks(x.float())
    amax = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-8)
    codes = (blocks * (BLOCK / amax)[:, None, :, None]).round().clamp(-128, 127).to(torch.int8)
    return codes.flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous(), amax / BLOCK


def _quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks = (-(-x.shape[0] // BLOCK), -(-x.shape[1] // BLOCK))
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(blocks, dtype=torch.float32)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of int8 codes [M, K] and [N, K], exact, in float32; K up to 1024."""
    if a.is_cuda and a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0:
        return torch._int_mm(a.contiguous(), b.contiguous().T).float()
    return a.float() @ b.float().T


def _product(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
) -> Tensor:
    out = codes.new_zeros(codes.shape[0], weight.shape[0], dtype=torch.float32)
    row, column = (torch.arange(n, device=codes.device) // BLOCK for n in out.shape)
    for i in range(scale.shape[1]):
        part = slice(i * BLOCK, (i + 1) * BLOCK)
        out += integer_product(codes[:, part], weight[:, part]) * (scale[row, i, None] * weight_scale[column, i])
    return finish(out, bias, dtype, activation)


_quantize_operation = Operation("quantize_int8_blockwise", _quantize, _quantize_fake)
_product_operation = Operation(
    "product_int8_blockwise", _product, product_fake, product_flops, gradient=False, reads=torch.int8
)


def quantize_int8_blockwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round to int8 with one scale per 128 x 128 block (round half to even, saturating).

    Args:
        x: [M, K], any float dtype.

    Returns:
        int8 [M, K] and float32 scales [ceil(M / 128), ceil(K / 128)]; x is about codes * scale of the block.
    """
    return _quantize_operation(x)


def dequantize_int8_blockwise(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """int8 [M, K] and float32 [ceil(M / 128), ceil(K / 128)] -> [M, K] in `dtype`."""
    row, column = (torch.arange(n, device=codes.device) // BLOCK for n in codes.shape)
    return (codes.float() * scale[row[:, None], column]).to(dtype)


def product_int8_blockwise(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
) -> Tensor:
    """Rows already in int8 blocks times W^T + bias: integer products per block, float32 sums over blocks.

    Args:
        codes: int8 [M, K]. scale: float32 [ceil(M / 128), ceil(K / 128)]. weight: int8 [N, K].
        weight_scale: float32 [ceil(N / 128), ceil(K / 128)]. bias: [N] or None. dtype: of the result.
        activation: "none", or "gelu_tanh" of the rounded result. Any K: a part block counts as zero-filled.

    Returns:
        [M, N] in `dtype`, rounded once, after the bias.

    Raises:
        RequestError: no such activation, or shapes that do not go together.
    """
    m, n, k = (-(-size // BLOCK) for size in (codes.shape[0], weight.shape[0], weight.shape[-1]))
    check_product(codes, scale, weight, weight_scale, bias, activation, ((m, k), (n, k)))
    return _product_operation(codes, scale, weight, weight_scale, bias, dtype, activation)


def linear_int8_blockwise(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with both sides in int8 blocks.

    The activation is quantised inside. In a batch its blocks never cross samples: the caller passes one sample's rows,
    or rows padded to a multiple of 128 per sample.

    Args:
        x: [M, K]. weight: int8 [N, K]. weight_scale: float32 [ceil(N / 128), ceil(K / 128)]. bias: [N] or None.

    Returns:
        [M, N] in x's dtype, rounded once, after the bias.

    Raises:
        RequestError: shapes that do not go together.
    """
    return product_int8_blockwise(*quantize_int8_blockwise(x), weight, weight_scale, bias, x.dtype)


offer(_quantize_operation, "quantize", "quantize_int8_blockwise", dtypes=FLOATS)
offer(_product_operation, "matmul_int8", "product_int8_blockwise", dtypes=(torch.int8,))
