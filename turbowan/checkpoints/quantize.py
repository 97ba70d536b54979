"""Official int8 blocks from floating-point weights."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .. import ops
from ..errors import CheckpointError
from .files import State

# every linear layer inside a block but SLA's projection, as the official tool takes them
_QUANTIZED = re.compile(r"^(blocks\.\d+\.(?:self_attn\.[qkvo]|cross_attn\.(?:[qkvo]|[kv]_img)|ffn\.[02]))\.weight$")
_FLOAT32 = re.compile(r"(\.norm_[qk](_img)?\.weight|\.norm3\.(weight|bias))$")


def quantize_transformer(state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> State:
    """A transformer under our names with int8 blocks in its blocks' linear layers; norms become float32.

    Weights are rounded to bfloat16 first, as the official tool sees them.

    Raises:
        CheckpointError: a weight is in 8 bits already.
    """
    out: State = {}
    for key, value in state.items():
        match = _QUANTIZED.match(key)
        if match is None:
            if key.endswith(".int8_weight") or (value.element_size() == 1 and value.ndim == 2):
                raise CheckpointError(f"{key} is {value.dtype} already; quantise from the full-precision file")
            out[key] = value.float() if _FLOAT32.search(key) else value
            continue
        if not value.is_floating_point() or value.element_size() == 1:
            raise CheckpointError(f"{key} is {value.dtype} already; quantise from the full-precision file")
        codes, scale = ops.quantize_int8_blockwise(value.to(device=device, dtype=torch.bfloat16))
        out[f"{match[1]}.int8_weight"], out[f"{match[1]}.scale"] = codes.cpu(), scale.cpu()
    return out
