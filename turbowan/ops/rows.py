"""What a linear layer reads: rows of numbers as they are, or rounded to 8 bits with their scales."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RequestError
from .fp8_rowwise import quantize_fp8_rowwise
from .int8_blockwise import BLOCK, quantize_int8_blockwise
from .int8_rowwise import quantize_int8_rowwise

FORMATS = ("bf16", "int8_row", "fp8_row", "int8_block")


def check_format(format: str) -> None:
    """Raises RequestError for an unknown one."""
    if format not in FORMATS:
        raise RequestError(f"a linear layer's input is one of {', '.join(FORMATS)}, got '{format}'")


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


def rows_fake(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Empty codes and scales of x's rows [B, L, D] in a format."""
    batch, length, width = x.shape
    if format == "int8_block":
        blocks = -(-length // BLOCK)
        rows = batch * blocks * BLOCK if batch > 1 else length
        scale = x.new_empty((batch * blocks, -(-width // BLOCK)), dtype=torch.float32)
        return x.new_empty((rows, width), dtype=torch.int8), scale
    if format == "bf16":
        return x.new_empty((batch * length, width)), x.new_empty(0)
    dtype = torch.int8 if format == "int8_row" else torch.float8_e4m3fn
    return x.new_empty((batch * length, width), dtype=dtype), x.new_empty((batch * length, 1), dtype=torch.float32)
