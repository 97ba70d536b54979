"""ComfyUI's single files: prefixed names, 8-bit floats with scales, the tokenizer inside the text encoder."""

from __future__ import annotations

import json

import torch

from ..errors import CheckpointError
from . import diffusers, wan
from .detect import FP8, strip_prefixes
from .files import State

SPIECE = "spiece_model"
PREFIX = "model.diffusion_model."


def read_transformer(state: State) -> State:
    return _plain_scales(wan.read_transformer(state))


def write_transformer(state: State) -> State:
    return {PREFIX + key: value for key, value in wan.write_transformer(state).items()}


def read_vae(state: State) -> State:
    return strip_prefixes(state)


def write_vae(state: State) -> State:
    return dict(state)


def read_text_encoder(state: State) -> State:
    state = {key: value for key, value in state.items() if key != SPIECE}
    return diffusers.read_text_encoder(_plain_scales(state))


def write_text_encoder(state: State) -> State:
    return dict(state)


def _plain_scales(state: State) -> State:
    """Both of ComfyUI's notations for quantised layers to ours: `scale_weight` for fp8, `weight_scale` rows for int8.

    Scales of activations are dropped (activations are scaled as they come).
    """
    out: State = {}
    for key, value in state.items():
        layer, _, leaf = key.rpartition(".")
        if key == "scaled_fp8" or leaf in ("scale_input", "input_scale"):
            continue
        if leaf == "comfy_quant":
            _check_format(layer, value)
            continue
        if leaf in ("weight_scale", "scale_weight"):
            weight = state[f"{layer}.weight"]
            if weight.dtype in FP8:
                out[f"{layer}.scale_weight"] = _fitting(layer, value.float(), weight)
                continue
            if weight.dtype == torch.int8:
                rows = _fitting(layer, value.float(), weight)
                out[f"{layer}.weight_scale"] = rows.expand(weight.shape[0]).reshape(-1, 1).contiguous()
                continue
            if value.numel() == 1 and value.item() == 1:  # a layer kept in full precision
                continue
            raise CheckpointError(f"{layer} has a scale but its weight is {weight.dtype}")
        out[key] = value
    return out


def _fitting(layer: str, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if scale.numel() not in (1, weight.shape[0]):
        raise CheckpointError(
            f"{layer} has {scale.numel()} scales for {weight.shape[0]} rows; one, or one a row, can be read"
        )
    return scale.flatten()


def _check_format(layer: str, value: torch.Tensor) -> None:
    text = bytes(value.tolist()).decode(errors="replace")
    try:
        facts = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{layer}.comfy_quant is not JSON: {text[:60]!r}") from error
    if facts.get("format") not in ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise") or facts.get("convrot"):
        name = facts.get("format", "?") + (" with convrot" if facts.get("convrot") else "")
        raise CheckpointError(f"{layer} is stored as {name}; fp8 and int8_tensorwise without rotation can be read")
