"""Weights as the fast paths want them: linear layers in another 8-bit format, q, k and v as one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.int8_blockwise import BLOCK
from .linear import Fp8Linear, Fp8RowLinear, Int8BlockLinear, Int8RowLinear, RowLinear, format_of, is_changed
from .transformer import SelfAttention, WanTransformer

# format -> layer, the names of its codes and scales, and what makes them of a weight [N, K]
_FORMATS: dict[str, tuple[type[nn.Module], tuple[str, str], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "int8_row": (Int8RowLinear, ("weight", "weight_scale"), ops.quantize_int8_rowwise),
    "fp8_row": (Fp8RowLinear, ("weight", "weight_scale"), ops.quantize_fp8_rowwise),
    "int8_block": (Int8BlockLinear, ("int8_weight", "scale"), ops.quantize_int8_blockwise),
}
_WHOLE = ("proj_l",)  # as the official tool leaves it


def prepare(net: WanTransformer, linears: str) -> None:
    """Ready a loaded transformer for inference, in place: q, k and v are joined on a GPU.

    Args:
        linears: a format for the linear layers, as of `round_linears`; the net's own (`file_format`) leaves them alone.
    """
    if linears != file_format(net):
        round_linears(net, linears)
    if net.patch_embedding.bias.is_cuda:
        join_qkv(net)


def file_format(net: nn.Module) -> str:
    """The format that the blocks' linear layers are in, of a loaded net or one on the meta device: one of
    `ops.rows.FORMATS`, "fp8_scaled" (in bfloat16 once expanded), or "mixed".
    """
    formats = {
        "fp8_scaled" if isinstance(layer, Fp8Linear) else format_of(layer)
        for name, layer in net.blocks.named_modules()  # type: ignore[union-attr, operator]
        if is_linear(layer) and name.rpartition(".")[2] not in _WHOLE
    }
    return formats.pop() if len(formats) == 1 else "mixed"


def round_linears(net: WanTransformer, format: str) -> None:
    """Turn the blocks' linear layers, of any kind, into others in place, one after the other.

    Args:
        format: "int8_row", "fp8_row" or "int8_block", or "bf16": full precision, in the dtype of the rest. Layers that
            are in it already stay as they are.
    """
    for module in list(net.blocks.modules()):
        for name, layer in list(module.named_children()):
            if name in _WHOLE or not is_linear(layer):
                continue
            if format == "bf16":
                setattr(module, name, _whole_linear(layer, net.patch_embedding.weight.dtype))
            elif not isinstance(layer, _FORMATS[format][0]):
                setattr(module, name, _rounded_linear(layer, format, net.patch_embedding.weight.dtype))


def _rounded_linear(layer: nn.Module, format: str, dtype: torch.dtype) -> nn.Module:
    kind, names, quantize = _FORMATS[format]
    weight, bias = full_weight(layer), layer.state_dict()["bias"]
    if format == "fp8_row" and dtype == torch.bfloat16:  # as PyTorch's product takes it: else a kernel at each call
        bias = bias.to(dtype)
    rounded = kind(weight.shape[1], weight.shape[0], "meta")
    for target, value in zip((*names, "bias"), (*quantize(weight), bias), strict=True):
        setattr(rounded, target, value)
    return rounded


def _whole_linear(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return layer
    weight, bias = full_weight(layer).to(dtype), layer.state_dict()["bias"].to(dtype)
    whole = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=dtype)
    whole.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return whole.requires_grad_(False)


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
    """Make one layer of each self-attention's q, k and v, whose names then disappear: for inference only.

    They stay apart where they are of different kinds, where an adapter adds to one, or where one is hooked into.
    """
    for attention in [module for module in net.modules() if isinstance(module, SelfAttention)]:
        if attention.qkv is None and _joinable([attention.q, attention.k, attention.v]):
            attention.qkv = _joined([attention.q, attention.k, attention.v])
            del attention.q, attention.k, attention.v


def _joinable(layers: Sequence[nn.Module]) -> bool:
    if any(is_changed(layer) or getattr(layer, "addition", None) is not None for layer in layers):
        return False
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
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(any(each.get_parameter(name).requires_grad for each in layers))
    return layer
