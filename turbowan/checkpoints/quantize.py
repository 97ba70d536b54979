"""Official int8 blocks from floating-point weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import ops
from ..errors import CheckpointError
from .files import State, check_output, stream_tensors
from .load import outline, read
from .official import write_transformer

# every linear layer inside a block but SLA's projection, as the official tool takes them
_QUANTIZED = re.compile(r"^(blocks\.\d+\.(?:self_attn\.[qkvo]|cross_attn\.(?:[qkvo]|[kv]_img)|ffn\.[02]))\.weight$")
# what a file can hold in 8 bits besides, to be small: it is expanded when it is read
_EXPANDED = re.compile(r"^(text_embedding\.[02]|time_embedding\.[02]|time_projection\.1)\.weight$")
_FLOAT32 = re.compile(r"(\.norm_[qk](_img)?\.weight|\.norm3\.(weight|bias))$")


def quantize_checkpoint(
    source: Path,
    target: Path,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a transformer of any family in the layout of TurboDiffusion's `-quant` files.

    A `.safetensors` target is written one layer after another; a `.pth` one is held in memory whole before.

    Args:
        source: a full-precision file, shard index or folder.
        target: `.safetensors` or `.pth`.
        device: where codes and scales are computed, one layer at a time.
        progress: called with the number of tensors done and their total.

    Raises:
        CheckpointError: unreadable, incomplete, no transformer, or in 8 bits already. Nothing is written then.
    """
    check_output(source, target)
    state, found = read(source, "transformer")
    if found.quantization != "none":
        raise CheckpointError(f"{source} is {found}: it is in 8 bits already; quantise the full-precision file")
    outline(state, "transformer", str(source))  # refuses what is incomplete
    state = write_transformer(state)
    layout = quantize_transformer({key: value.to("meta") for key, value in state.items()}, "meta")

    def counted() -> Iterator[tuple[str, Tensor]]:
        for done, pair in enumerate(quantized_tensors(state, device), start=1):
            yield pair
            progress(done, len(layout))

    stream_tensors(target, layout, counted())


def quantize_transformer(
    state: Mapping[str, Tensor], device: torch.device | str = "cpu", small: bool = False
) -> State:
    """A transformer under our or the official names with int8 blocks in its blocks' linear layers and float32 norms.

    Weights are rounded to bfloat16 first, as the official tool sees them.

    Args:
        small: also the layers around the blocks, which only we read so; they are expanded then.

    Raises:
        CheckpointError: a weight is in 8 bits already.
    """
    return dict(quantized_tensors(state, device, small))


def quantized_tensors(
    state: Mapping[str, Tensor], device: torch.device | str = "cpu", small: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """`quantize_transformer`, key by key: one layer at a time is computed and held."""
    for key, value in state.items():
        match = _QUANTIZED.match(key) or (_EXPANDED.match(key) if small else None)
        if key.endswith(".int8_weight") or (value.itemsize == 1 and value.ndim == 2):
            kind = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(f"{key} is {kind} already; quantise the full-precision file")
        if match is None:
            yield key, value.float() if _FLOAT32.search(key) else value
            continue
        codes, scale = ops.quantize_int8_blockwise(value.to(device=device, dtype=torch.bfloat16))
        home = value.device
        yield f"{match[1]}.int8_weight", codes.to(home)
        yield f"{match[1]}.scale", scale.to(home)


def quantize_vae(state: Mapping[str, Tensor]) -> State:
    """A VAE whose convolutions' weights are int8 with one scale per output channel; they are expanded when read."""
    out: State = {}
    for key, value in state.items():
        if value.ndim < 3 or not key.endswith(".weight") or value.dtype == torch.int8:
            out[key] = value
            continue
        codes, out[f"{key}_scale"] = ops.quantize_int8_rowwise(value.flatten(1).float())
        out[key] = codes.view(value.shape)
    return out
