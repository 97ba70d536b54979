"""Files of true sizes with random weights, in published layouts, written as fast as the disk takes them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.comfy import write_transformer as write_comfy
from ..checkpoints.files import State, stream_tensors
from ..checkpoints.load import on_meta
from ..checkpoints.official import write_transformer as write_official
from ..checkpoints.quantize import quantize_transformer
from ..checkpoints.scales import write_comfy_scales
from ..checkpoints.wan import write_text_encoder, write_transformer
from ..models.text_encoder import TextEncoder, TextSizes
from ..models.transformer import TransformerConfig, WanTransformer
from ..models.vae import WanVAE

TRANSFORMERS = {
    "1.3B": TransformerConfig(dim=1536, ffn_dim=8960, num_layers=30, text_dim=4096, has_sla=True),
    "14B": TransformerConfig(dim=5120, ffn_dim=13824, num_layers=40, text_dim=4096, has_sla=True),
    "tiny": TransformerConfig(dim=256, ffn_dim=768, num_layers=2, text_dim=256, has_sla=True),
}
FORMATS = ("bf16", "int8_block", "int8_row", "fp8")  # TurboDiffusion's two, lightx2v's, ComfyUI's
TEXT_FORMATS = ("bf16", "fp8")
PICTURE = 0.05  # of the decoder's last convolution: frames as easy to compress as filmed ones, which noise is not

_LINEAR = re.compile(r"^blocks\.\d+\.((self|cross)_attn\.([qkvo]|[kv]_img)|ffn\.[02])\.weight$")
_TEXT_LINEAR = re.compile(r"\.(SelfAttention\.[qkvo]|DenseReluDense\.w(i_[01]|o))\.weight$")
_CODES = {torch.int8: 32.0, torch.float8_e4m3fn: 16.0}  # standard deviation of 8-bit codes

TEXT_ENCODERS = {
    "xxl": TextSizes(256384, 4096, 24, 64, 64, 10240),
    "tiny": TextSizes(512, 256, 2, 4, 64, 640),
}


def transformer_layout(config: TransformerConfig, format: str) -> State:
    """Keys, shapes and dtypes of a file, on the meta device.

    Args:
        format: of the blocks' linear layers: "bf16" and "int8_block" in TurboDiffusion's layout, "int8_row" in
            lightx2v's, "fp8" in ComfyUI's `fp8_scaled`.
    """
    with on_meta():
        net = WanTransformer(config)
    state = {key: _float32_norm(key, value) for key, value in net.state_dict().items()}
    if format == "bf16":
        return write_official(state)
    if format == "int8_block":
        return write_official(quantize_transformer(state, "meta"))
    if format == "int8_row":
        return write_transformer(_in_8_bits(state, _LINEAR, torch.int8))
    return write_comfy(_in_8_bits(state, _LINEAR, torch.float8_e4m3fn))


def text_layout(sizes: TextSizes, format: str) -> State:
    """As `transformer_layout`: "bf16" in Wan's layout, "fp8" in ComfyUI's."""
    with on_meta():
        encoder = TextEncoder(**vars(sizes))
    state = {key: value.bfloat16() for key, value in encoder.model.state_dict().items()}
    if format == "bf16":
        return write_text_encoder(state)
    return write_comfy_scales(_in_8_bits(state, _TEXT_LINEAR, torch.float8_e4m3fn))


def vae_layout(dim: int) -> State:
    """In Wan's layout, float32 as published."""
    with on_meta():
        return WanVAE(dim).state_dict()


def write_random(
    path: Path,
    layout: Mapping[str, Tensor],
    device: torch.device | str,
    seed: int,
    report: Callable[[str, int], None] = lambda key, size: None,
) -> None:
    """Write a `.safetensors` file, values drawn so that a network of them stays finite.

    Args:
        layout: of this module; tensors on a real device are written as they are.
        device: where the values are drawn.
        report: called with each tensor's name and bytes.

    Raises:
        CheckpointError: the place cannot be written.
    """

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for key, value in _drawn(layout, device, seed):
            yield key, value
            report(key, value.nbytes)

    with torch.inference_mode():
        stream_tensors(path, layout, tensors())


def draw_state(layout: Mapping[str, Tensor], device: torch.device | str, seed: int) -> State:
    """What `write_random` writes, all of it on the device instead."""
    return dict(_drawn(layout, device, seed))


def _drawn(layout: Mapping[str, Tensor], device: torch.device | str, seed: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator(device).manual_seed(seed)
    for key, like in layout.items():
        yield key, _draw(key, like, layout, generator) if like.is_meta else like


def _draw(key: str, like: Tensor, layout: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    layer, _, leaf = key.rpartition(".")
    shape, device = like.shape, generator.device

    def normal(std: float) -> Tensor:
        dtype = torch.float32 if device.type == "cpu" or like.dtype in _CODES else like.dtype
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(std)

    if leaf in ("scale", "weight_scale", "scale_weight"):
        weight = layout[f"{layer}.int8_weight" if leaf == "scale" else f"{layer}.weight"]
        return torch.full(shape, 1 / (_CODES[weight.dtype] * weight.shape[1] ** 0.5), device=device)
    if like.dtype == torch.int8:
        return normal(_CODES[torch.int8]).round_().clamp_(-128, 127).to(torch.int8)
    if like.dtype in _CODES:
        return normal(_CODES[like.dtype]).to(like.dtype)
    if leaf == "gamma" or (like.ndim == 1 and leaf == "weight"):
        return normal(0.02).add_(1).to(like.dtype)
    if leaf == "bias" or leaf == "modulation":
        return normal(0.02).to(like.dtype)
    last = PICTURE if key == "decoder.head.2.weight" else 1.0
    return normal(last * math.prod(shape[1:]) ** -0.5).to(like.dtype)


def _float32_norm(key: str, value: Tensor) -> Tensor:
    """The published files' own mixture."""
    return value.float() if re.search(r"\.norm(_[qk](_img)?|3)\.", key) else value.bfloat16()


def _in_8_bits(state: State, pattern: re.Pattern[str], dtype: torch.dtype) -> State:
    """The weights that a pattern finds as codes, with one scale (float8) or one a row (int8) beside them."""
    out: State = {}
    for key, value in state.items():
        if pattern.search(key) is None:
            out[key] = value
            continue
        out[key] = value.to(dtype)
        name, shape = ("weight_scale", (value.shape[0], 1)) if dtype == torch.int8 else ("scale_weight", (1,))
        out[f"{key.removesuffix('weight')}{name}"] = torch.empty(shape, dtype=torch.float32, device="meta")
    return out
