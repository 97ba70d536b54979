"""A model folder from the training stages' files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints.files import make_folder, read_tensors, write_tensors
from ..checkpoints.manifest import FILE_NAME, Manifest, check_manifest, read_manifest, write_manifest
from ..checkpoints.official import read_transformer, write_transformer
from ..checkpoints.quantize import quantize_transformer, quantize_vae
from ..errors import CheckpointError, RequestError

KINDS: dict[str, dict[str, Any]] = {
    "base": {
        "family": "tiny-t2v", "sampler": "unipc", "num_steps": 20, "shift": 8.0, "guidance_scale": 3.0,
        "distilled": False,
    },
    "t2v": {"family": "tiny-t2v", "sampler": "rcm", "num_steps": 4},
    "i2v": {"family": "tiny-i2v", "sampler": "rcm", "num_steps": 4, "sigma_max": 200.0, "boundary": 0.9},
}  # fmt: skip
_SIZE: dict[str, Any] = {"width": 256, "height": 160, "num_frames": 33, "fps": 16}
_NAMES = {"vae": "vae.safetensors", "text_encoder": "text_encoder.safetensors", "tokenizer": "tokenizer/spiece.model"}


def pack_model(
    out: Path,
    kind: str,
    transformers: Mapping[str, Path],
    others: Mapping[str, Path] | Path,
    sla_topk: float = 0.1,
    quantize: bool = True,
) -> Path:
    """Write a model folder with its manifest; the folder's name is the model's.

    Args:
        kind: a key of `KINDS`: how the model is sampled.
        transformers: files by role: "transformer", or "high_noise" and "low_noise".
        others: files of "vae", "text_encoder" and "tokenizer" to copy; or a model's folder beside this one, to share
            its files.
        sla_topk: of transformers with SLA.
        quantize: int8 in the transformers' layers and in the VAE's convolutions.

    Returns:
        The manifest's path.

    Raises:
        RequestError: no such kind.
        CheckpointError: a file is missing or cannot be read, the roles are no model's, or the folder cannot be written.
    """
    if kind not in KINDS:
        raise RequestError(f"a model is packed as one of {', '.join(KINDS)}, got '{kind}'")
    sources = [*transformers.values(), *(() if isinstance(others, Path) else others.values())]
    for source in sources:
        if not source.is_file():
            raise CheckpointError(f"{source} does not exist; run its stage first")
    if isinstance(others, Path):
        shared = read_manifest(others / FILE_NAME).files
        files = {role: shared[role] for role in _NAMES}
    else:
        files = {role: out / name for role, name in _NAMES.items()}
    files |= {role: out / f"{role}.safetensors" for role in transformers}
    manifest = Manifest(name=out.resolve().name, files=files, **KINDS[kind], **_SIZE)
    check_manifest(manifest, str(out))
    make_folder(out)
    has_sla = False
    for role, source in transformers.items():
        state = read_transformer(read_tensors(source))
        has_sla = any(".proj_l." in key for key in state)
        write_tensors(files[role], write_transformer(quantize_transformer(state, small=True) if quantize else state))
    if not isinstance(others, Path):
        for role in ("text_encoder", "tokenizer"):
            make_folder(files[role].parent)
            if others[role].resolve() != files[role].resolve():
                shutil.copyfile(others[role], files[role])
        vae = read_tensors(others["vae"])
        write_tensors(files["vae"], quantize_vae(vae) if quantize else vae)
    if files["tokenizer"].is_file():
        files["tokenizer"] = files["tokenizer"].parent
    attention: dict[str, Any] = {"sla_topk": sla_topk} if has_sla else {"attention": "original"}
    return write_manifest(replace(manifest, **attention), out)
