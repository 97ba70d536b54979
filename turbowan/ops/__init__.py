"""The operations of the transformer: each an eager twin, a `torch.library` operation and a dispatch entry."""

from .attention import attention
from .block_map import block_map
from .channel_norm import channel_norm
from .conv3d import conv3d
from .formats import FormatChoice, choose_format, compute_dtype
from .fp8_rowwise import linear_fp8_rowwise, product_fp8_rowwise, quantize_fp8_rowwise
from .fp8_scaled import linear_fp8_scaled
from .gelu_rows import gelu_rows
from .int8_blockwise import (
    dequantize_int8_blockwise,
    linear_int8_blockwise,
    product_int8_blockwise,
    quantize_int8_blockwise,
)
from .int8_rowwise import linear_int8_rowwise, product_int8_rowwise, quantize_int8_rowwise
from .layer_norm import layer_norm
from .linear import linear
from .qk_norm_rope import qk_norm_rope
from .registry import OPERATIONS, Facts, explain, force
from .residual_norm import residual_norm
from .rms_norm import rms_norm
from .rope import rope, rope_table
from .sparse_linear_attention import sparse_linear_attention

__all__ = [
    "OPERATIONS",
    "Facts",
    "FormatChoice",
    "attention",
    "block_map",
    "channel_norm",
    "choose_format",
    "compute_dtype",
    "conv3d",
    "dequantize_int8_blockwise",
    "explain",
    "force",
    "gelu_rows",
    "layer_norm",
    "linear",
    "linear_fp8_rowwise",
    "linear_fp8_scaled",
    "linear_int8_blockwise",
    "linear_int8_rowwise",
    "product_fp8_rowwise",
    "product_int8_blockwise",
    "product_int8_rowwise",
    "qk_norm_rope",
    "quantize_fp8_rowwise",
    "quantize_int8_blockwise",
    "quantize_int8_rowwise",
    "residual_norm",
    "rms_norm",
    "rope",
    "rope_table",
    "sparse_linear_attention",
]
