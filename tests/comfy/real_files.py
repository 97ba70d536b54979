"""Small files under the names that published graphs ask for, in the layouts that those names stand for."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from real_server import REPOSITORY

from turbowan.checkpoints.convert import convert_checkpoint
from turbowan.checkpoints.files import write_tensors
from turbowan.checkpoints.official import write_transformer
from turbowan.checkpoints.quantize import quantize_transformer
from turbowan.models.transformer import TransformerConfig, WanTransformer
from turbowan.models.vae import WanVAE
from turbowan.world.pictures import draw_pictures

TINY = REPOSITORY / "turbowan" / "assets" / "tiny"
EXPERTS = ("TurboWan2.2-I2V-A14B-high-720P-quant.pth", "TurboWan2.2-I2V-A14B-low-720P-quant.pth")
VAE, TEXT_ENCODER = "wan_2.1_vae.safetensors", "nsfw_wan_umt5-xxl_fp8_scaled.safetensors"
WIDTH, HIDDEN, LAYERS, HEADS, VOCABULARY = 4096, 10240, 24, 64, 256384  # of umT5-xxl; ComfyUI takes no other


def write_picture(folder: Path) -> None:
    """A still picture of 512x320 to start from, under the name of the one that comes with every ComfyUI."""
    drawn = draw_pictures(1, torch.Generator().manual_seed(1), "cpu", 320)[0, :, :320, :512]
    pixels = ((drawn.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    Image.fromarray(pixels.movedim(0, -1).numpy()).save(folder / "example.png")


def write_experts(folder: Path, text_dim: int) -> None:
    """Two image-to-video transformers of width 256 with random weights, in official int8 blocks."""
    for seed, name in enumerate(EXPERTS):
        torch.manual_seed(seed)
        config = TransformerConfig(256, 512, 2, text_dim=text_dim, in_dim=36, has_sla=True)
        state = {key: value.to(torch.bfloat16) for key, value in WanTransformer(config).state_dict().items()}
        write_tensors(folder / name, write_transformer(quantize_transformer(state)))


def write_whole_vae(folder: Path) -> None:
    """The VAE at its true size, 254 MB, with random weights: ComfyUI's own loader takes no smaller one."""
    torch.manual_seed(0)
    write_tensors(folder / VAE, {key: value.to(torch.bfloat16) for key, value in WanVAE().state_dict().items()})


def write_small_umt5(folder: Path) -> None:
    """The embedded text encoder, as ComfyUI's files are laid out: its tokenizer inside. Our own nodes take any size."""
    convert_checkpoint(TINY / "text_encoder.safetensors", folder / TEXT_ENCODER, "comfy", TINY / "tokenizer")


def write_sparse_umt5(folder: Path) -> None:
    """umT5-xxl as ComfyUI's scaled fp8 file: 5.7 GB by its header, a few MB on disk, the rest holes (zeros).

    Norms are one and the rows of the tokenizer's own pieces random, so that texts differ.
    """
    pieces = np.frombuffer((TINY / "tokenizer" / "spiece.model").read_bytes(), dtype=np.uint8)
    fp8, one = "F8_E4M3", np.ones(WIDTH, dtype=np.float16)
    rows = np.random.default_rng(0).integers(0, 0x38, (1024, WIDTH), dtype=np.uint8)  # 0 to 1 in e4m3
    parts: dict[str, tuple[str, tuple[int, ...], np.ndarray | None]] = {
        "scaled_fp8": (fp8, (0,), None),
        "spiece_model": ("U8", pieces.shape, pieces),
        "shared.weight": (fp8, (VOCABULARY, WIDTH), rows),
        "encoder.final_layer_norm.weight": ("F16", (WIDTH,), one),
    }
    for layer in range(LAYERS):
        first, second = (f"encoder.block.{layer}.layer.{i}" for i in (0, 1))
        attention, dense = f"{first}.SelfAttention", f"{second}.DenseReluDense"
        shapes = {f"{attention}.{key}": (WIDTH, WIDTH) for key in "qkvo"}
        shapes |= {f"{dense}.wi_0": (HIDDEN, WIDTH), f"{dense}.wi_1": (HIDDEN, WIDTH), f"{dense}.wo": (WIDTH, HIDDEN)}
        for name, shape in shapes.items():
            parts[f"{name}.weight"] = (fp8, shape, None)
            parts[f"{name}.scale_weight"] = ("F32", (), np.ones((), dtype=np.float32))
        parts[f"{attention}.relative_attention_bias.weight"] = ("F16", (32, HEADS), None)
        parts |= {f"{each}.layer_norm.weight": ("F16", (WIDTH,), one) for each in (first, second)}
    sizes = {fp8: 1, "U8": 1, "F16": 2, "F32": 4}
    header, end = {}, 0
    for name, (kind, shape, _) in parts.items():
        start, end = end, end + sizes[kind] * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / TEXT_ENCODER).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (_, _, content) in parts.items():
            if content is not None:
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(content.tobytes())
        file.truncate(8 + len(text) + end)
