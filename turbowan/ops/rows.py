"""What a linear layer reads: rows of numbers as they are, or rounded to 8 bits with their scales."""

import torch.nn.functional as F
from torch import Tensor

from .fp8_rowwise import quantize_fp8_rowwise
from .int8_blockwise import BLOCK, quantize_int8_blockwise
from .int8_rowwise import quantize_int8_rowwise

FORMATS = ("bf16", "int8_row", "fp8_row", "int8_block")


def sample_rows(x: Tensor, format: str) -> Tensor:
    """[B, L, D] -> [B * L, D]; of several samples for "int8_block", each is first padded with zeros to whole blocks."""
    if format == "int8_block" and x.shape[0] > 1:
        x = F.pad(x, (0, 0, 0, -x.shape[1] % BLOCK))
    return x.flatten(0, 1)


def quantize_rows(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Rows [M, K] in a format: the numbers or codes [M, K], and their scales (empty for "bf16": no rounding at all)."""
    if format == "int8_row":
        return quantize_int8_rowwise(x)
    if format == "fp8_row":
        return quantize_fp8_rowwise(x)
    if format == "int8_block":
        return quantize_int8_blockwise(x)
    return x, x.new_empty(0)
