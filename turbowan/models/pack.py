"""Weights as the fast paths want them: linear layers in another 8-bit format, q, k and v as one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.int8_blockwise import BLOCK
from .linear import Fp8Linear, Fp8RowLinear, Int8BlockLinear, Int8RowLinear, RowLinear
from .transformer import SelfAttention, WanTransformer

# format -> layer, the names of its codes and scales, and what makes them of a weight [N, K]
_FORMATS: dict[str, tuple[type[nn.Module], tuple[str, str], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "int8_row": (Int8RowLinear, ("weight", "weight_scale"), ops.quantize_int8_rowwise),
    "fp8_row": (Fp8RowLinear, ("weight", "weight_scale"), ops.quantize_fp8_rowwise),
    "int8_block": (Int8BlockLinear, ("int8_weight", "scale"), ops.quantize_int8_blockwise),
}
_WHOLE = ("proj_l",)  # as the official tool leaves it


def prepare(net: WanTransformer, linears: str | None) -> None:
    """Ready a loaded transformer for inference, in place: q, k and v are joined on a GPU.

    Args:
        linears: a format for the linear layers, as of `round_linears`; None leaves them as the file has them.
    """
    if linears is not None:
        round_linears(net, linears)
    if net.patch_embedding.bias.is_cuda:
        join_qkv(net)


def round_linears(net: WanTransformer, format: str) -> None:
    """Turn the blocks' linear layers, of any kind, into 8-bit ones in place, one after the other.

    Args:
        format: "int8_row", "fp8_row" or "int8_block"; layers that are in it already stay as they are.
    """
    kind, names, quantize = _FORMATS[format]
    for module in list(net.blocks.modules()):
        for name, layer in list(module.named_children()):
            if name in _WHOLE or isinstance(layer, kind) or not is_linear(layer):
                continue
            weight, bias = full_weight(layer), layer.state_dict()["bias"]
            rounded = kind(weight.shape[1], weight.shape[0], "meta")
            for target, value in zip((*names, "bias"), (*quantize(weight), bias), strict=True):
                setattr(rounded, target, value)
            setattr(module, name, rounded)


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies by a weight [N, K], however that is stored."""
    return isinstance(module, (nn.Linear, Int8BlockLinear, RowLinear, Fp8Linear))


def full_weight(layer: nn.Module) -> Tensor:
    """The weight [N, K] of a linear layer of any kind in floating point."""
    if isinstance(layer, Int8BlockLinear):
        return ops.dequantize_int8_blockwise(layer.int8_weight, layer.scale)
    if isinstance(layer, RowLinear):
        return layer.weight.float() * layer.weight_scale
    if isinstance(layer, Fp8Linear):
        return layer.weight.float() * layer.scale_weight.float().view(-1, 1)
    return layer.weight.detach()  # type: ignore[operator, return-value]


def join_qkv(net: WanTransformer) -> None:
    """Make one layer of each self-attention's q, k and v, whose names then disappear: for inference only."""
    for attention in [module for module in net.modules() if isinstance(module, SelfAttention)]:
        if attention.qkv is None and _joinable([attention.q, attention.k, attention.v]):
            attention.qkv = _joined([attention.q, attention.k, attention.v])
            del attention.q, attention.k, attention.v


def _joinable(layers: Sequence[nn.Module]) -> bool:
    kinds = {type(layer) for layer in layers}
    whole_blocks = all(layer.bias.shape[0] % BLOCK == 0 for layer in layers)  # type: ignore[index, union-attr]
    same = {Int8BlockLinear} if whole_blocks else set()
    return len(kinds) == 1 and kinds <= {nn.Linear, Int8RowLinear, Fp8RowLinear, *same}


def _joined(layers: Sequence[nn.Module]) -> nn.Module:
    """One layer with the outputs of all, in order."""
    states = [layer.state_dict() for layer in layers]
    values = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    outputs, width = len(values["bias"]), next(v for v in values.values() if v.ndim == 2).shape[1]
    layer = type(layers[0])(width, outputs, device="meta")
    layer.load_state_dict(values, assign=True)
    return layer
