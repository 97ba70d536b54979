"""GELU between the two linear layers of a feed-forward, rounded to what the second one reads."""

import torch.nn.functional as F
from torch import Tensor

from .registry import Operation
from .rows import check_format, quantize_rows, rows_fake, sample_rows
from .triton import offer


def _eager(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    return quantize_rows(sample_rows(F.gelu(x, approximate="tanh"), format).contiguous(), format)


_operation = Operation("gelu_rows", _eager, rows_fake)
offer(_operation, "gelu_rows", "gelu_rows")


def gelu_rows(x: Tensor, format: str = "bf16") -> tuple[Tensor, Tensor]:
    """GELU (tanh form) in float32, rounded to x's dtype, as the rows that a linear layer reads.

    Args:
        x: [B, L, F], any strides between rows and samples; or [M, F], the rows of one sample.
        format: one of `rows.FORMATS`.

    Returns:
        Rows [B * L, F] in the format and their scales, for "int8_block" padded per sample: as of `residual_norm`.

    Raises:
        RequestError: unknown format.
    """
    check_format(format)
    return _operation(x.unsqueeze(0) if x.ndim == 2 else x, format)
