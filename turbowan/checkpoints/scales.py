"""The scales of 8-bit layers: every family's notation to ours, ours to ComfyUI's, and weights expanded to floats.

Ours, behind a layer's name: `int8_weight` with `scale` per 128 x 128 block (TurboDiffusion), `weight` in int8 with
`weight_scale` [N, 1] (lightx2v), `weight` in float8 with `scale_weight`, [1] or [N] (ComfyUI).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..ops.int8_blockwise import dequantize_int8_blockwise
from .files import State

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MARKER = "scaled_fp8"  # an older ComfyUI file with fp8 scales says so by this key

_COMFY_FORMATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2", torch.int8: "int8_tensorwise"}


def read_scales(state: Mapping[str, Tensor]) -> State:
    """Our notation from any: ComfyUI's `scale_weight` and `weight_scale`, one or one a row, and lightx2v's.

    Scales of activations are dropped (activations are scaled as they come).

    Raises:
        CheckpointError: a format or a number of scales that is not read.
    """
    out: State = {}
    for key, value in state.items():
        layer, _, leaf = key.rpartition(".")
        if leaf in (MARKER, "scale_input", "input_scale"):
            continue
        if leaf == "comfy_quant":
            _check_format(layer, value)
        elif leaf in ("weight_scale", "scale_weight"):
            out.update(_scale(layer, value.float().flatten(), state.get(f"{layer}.weight")))
        else:
            out[key] = value
            if leaf == "weight" and value.dtype == torch.int8 and not _names_of(layer) & state.keys():
                raise CheckpointError(f"{key} is int8 with no scales; {value.shape[0]} are expected, one a row")
    return out


def _names_of(layer: str) -> set[str]:
    return {f"{layer}.weight_scale", f"{layer}.scale_weight"}


def _scale(layer: str, scale: Tensor, weight: Tensor | None) -> State:
    if weight is None:
        raise CheckpointError(f"{layer} has a scale but no weight")
    if weight.dtype not in (*FP8, torch.int8):
        if scale.numel() == 1 and scale.item() == 1:  # a layer kept in full precision
            return {}
        raise CheckpointError(f"{layer} has a scale but its weight is {str(weight.dtype).removeprefix('torch.')}")
    if scale.numel() not in (1, weight.shape[0]):
        raise CheckpointError(
            f"{layer} has {scale.numel()} scales for {weight.shape[0]} rows; one, or one a row, can be read"
        )
    if weight.dtype == torch.int8:
        return {f"{layer}.weight_scale": scale.expand(weight.shape[0]).reshape(-1, 1).contiguous()}
    return {f"{layer}.scale_weight": scale}


def _check_format(layer: str, value: Tensor) -> None:
    text = bytes(value.flatten().to(torch.uint8).tolist()).decode(errors="replace")
    try:
        facts = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{layer}.comfy_quant is not JSON: {text[:60]!r}") from error
    name = facts.get("format", "?") if isinstance(facts, dict) else "?"
    if name not in _COMFY_FORMATS.values() or facts.get("convrot"):
        name += " with convrot" if name != "?" and facts.get("convrot") else ""
        raise CheckpointError(f"{layer} is stored as {name}; fp8 and int8_tensorwise without rotation can be read")


def write_comfy_scales(state: Mapping[str, Tensor]) -> State:
    """ComfyUI's present notation: `weight_scale` and, as JSON in bytes, `comfy_quant` beside each 8-bit weight."""
    out: State = {}
    for key, value in state.items():
        layer, _, leaf = key.rpartition(".")
        if leaf not in ("weight_scale", "scale_weight"):
            out[key] = value
            continue
        weight = state[f"{layer}.weight"]
        facts = json.dumps({"format": _COMFY_FORMATS[weight.dtype]}).encode()
        out[f"{layer}.weight_scale"] = value.reshape(()) if value.numel() == 1 else value.reshape(-1, 1)
        out[f"{layer}.comfy_quant"] = torch.tensor(list(facts), dtype=torch.uint8)
    return out


def expand(state: State, layer: str) -> None:
    """Replace a layer's 8-bit weight and its scale, in our notation, by a floating-point `weight`, in place."""
    stored = state.get(f"{layer}.int8_weight", state.get(f"{layer}.weight"))
    if stored is not None and stored.is_meta:  # arithmetic there would import all of torch.compile: seconds
        for name in _names_of(layer) | {f"{layer}.int8_weight", f"{layer}.scale"}:
            state.pop(name, None)
        state[f"{layer}.weight"] = torch.empty(stored.shape, device="meta")
        return
    codes = state.pop(f"{layer}.int8_weight", None)
    if codes is not None:
        state[f"{layer}.weight"] = dequantize_int8_blockwise(codes, state.pop(f"{layer}.scale"))
        return
    weight = state[f"{layer}.weight"].float()
    for name in _names_of(layer) & state.keys():
        weight = weight * state.pop(name).view(-1, *[1] * (weight.ndim - 1))
    state[f"{layer}.weight"] = weight
