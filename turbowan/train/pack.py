"""A model folder from the training stages' files."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..checkpoints.files import make_folder, read_tensors, write_tensors
from ..checkpoints.manifest import Manifest, write_manifest
from ..checkpoints.official import read_transformer, write_transformer
from ..checkpoints.quantize import quantize_transformer
from ..errors import CheckpointError


def pack_model(out: Path, name: str, flow: Path, vae: Path, tokenizer: Path, quantize: bool = True) -> Path:
    """Copy VAE, text encoder and tokenizer, quantise the transformer, write the manifest.

    Args:
        out: the model's folder. flow: the folder of the flow stage. vae, tokenizer: files.
        quantize: int8 blocks in the transformer's linear layers.

    Returns:
        The manifest's path.

    Raises:
        CheckpointError: a file is missing or cannot be read, or the folder cannot be written.
    """
    files = {
        "transformer": out / "transformer.safetensors",
        "vae": out / "vae.safetensors",
        "text_encoder": out / "text_encoder.safetensors",
        "tokenizer": out / "tokenizer",
    }
    for source in (vae, flow / "text_encoder.safetensors", tokenizer):
        if not source.is_file():
            raise CheckpointError(f"{source} does not exist; run its stage first")
    state = read_transformer(read_tensors(flow / "transformer.safetensors"))
    make_folder(out)
    state = quantize_transformer(state) if quantize else state
    write_tensors(files["transformer"], write_transformer(state))
    for source, target in (
        (vae, files["vae"]),
        (flow / "text_encoder.safetensors", files["text_encoder"]),
        (tokenizer, files["tokenizer"] / "spiece.model"),
    ):
        target.parent.mkdir(exist_ok=True)
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)
    manifest = Manifest(
        name=name,
        family="tiny-t2v",
        files=files,
        sampler="unipc",
        num_steps=20,
        shift=8.0,
        guidance_scale=3.0,
        attention="original",
        width=256,
        height=160,
        num_frames=33,
        fps=16,
        distilled=False,
    )
    return write_manifest(manifest, out)
