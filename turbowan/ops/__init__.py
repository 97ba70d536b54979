"""The operations of the transformer: each an eager twin, a `torch.library` operation and a dispatch entry."""

from .attention import attention
from .block_map import block_map
from .channel_norm import channel_norm
from .conv3d import conv3d
from .fp8_scaled import linear_fp8_scaled
from .int8_blockwise import dequantize_int8_blockwise, linear_int8_blockwise, quantize_int8_blockwise
from .int8_rowwise import linear_int8_rowwise, quantize_int8_rowwise
from .layer_norm import layer_norm
from .registry import OPERATIONS, Facts, explain, force
from .rms_norm import rms_norm
from .rope import rope, rope_table
from .sparse_linear_attention import sparse_linear_attention

__all__ = [
    "OPERATIONS",
    "Facts",
    "attention",
    "block_map",
    "channel_norm",
    "conv3d",
    "dequantize_int8_blockwise",
    "explain",
    "force",
    "layer_norm",
    "linear_fp8_scaled",
    "linear_int8_blockwise",
    "linear_int8_rowwise",
    "quantize_int8_blockwise",
    "quantize_int8_rowwise",
    "rms_norm",
    "rope",
    "rope_table",
    "sparse_linear_attention",
]
