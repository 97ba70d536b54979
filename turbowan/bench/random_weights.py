"""Model folders of true sizes with random weights, in the official key layout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..checkpoints.files import write_tensors
from ..checkpoints.manifest import Manifest, from_defaults, write_manifest
from ..checkpoints.official import write_transformer
from ..checkpoints.quantize import quantize_transformer
from ..checkpoints.wan import write_text_encoder
from ..errors import RequestError
from ..models.text_encoder import TextEncoder
from ..models.transformer import TransformerConfig, WanTransformer
from ..models.vae import WanVAE

TRANSFORMERS = {
    "1.3B": TransformerConfig(dim=1536, ffn_dim=8960, num_layers=30, text_dim=4096, has_sla=True),
    "14B": TransformerConfig(dim=5120, ffn_dim=13824, num_layers=40, text_dim=4096, has_sla=True),
    "tiny": TransformerConfig(dim=256, ffn_dim=768, num_layers=2, text_dim=4096, has_sla=True),
}


def write_random_model(
    folder: Path, size: str, tokenizer: Path, quantize: bool = False, device: torch.device | str = "cpu", seed: int = 0
) -> Manifest:
    """Write transformer, VAE (base width 96; 16 for "tiny") and a two-layer umT5 of width 4096, and their manifest.

    Args:
        size: a key of TRANSFORMERS.
        tokenizer: a SentencePiece model of at most 512 pieces, for the small text encoder.
        quantize: official int8 blocks in the transformer.
        device: where the weights are drawn.

    Raises:
        RequestError: no such size.
        CheckpointError: the folder cannot be written.
    """
    if size not in TRANSFORMERS:
        raise RequestError(f"bench sizes are {', '.join(TRANSFORMERS)}; got '{size}'")
    torch.manual_seed(seed)
    files = {
        "transformer": folder / f"random-{size}{'-quant' if quantize else ''}.pth",
        "vae": folder / "random-vae.pth",
        "text_encoder": folder / "random-umt5.pth",
        "tokenizer": tokenizer,
    }
    with torch.device(device):
        transformer = WanTransformer(TRANSFORMERS[size])
        vae = WanVAE(16 if size == "tiny" else 96)
        encoder = TextEncoder(512, 4096, layers=2, heads=64, head_width=64, hidden=10240)
    state = _bf16(transformer)
    write_tensors(files["transformer"], write_transformer(quantize_transformer(state, device) if quantize else state))
    write_tensors(files["vae"], _bf16(vae))
    text = _bf16(encoder.model)
    text.pop("encoder.embed_tokens.weight")
    write_tensors(files["text_encoder"], write_text_encoder(text))
    manifest = from_defaults(f"random-{size}{'-quant' if quantize else ''}", "turbo-t2v", files)
    write_manifest(manifest, folder)
    return manifest


def _bf16(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.to(torch.bfloat16) for key, value in module.state_dict().items()}
