"""Whole models of true sizes for `bench pipeline`: what they consist of, and the folder that holds them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..checkpoints.files import State, make_folder
from ..checkpoints.find import EMBEDDED
from ..checkpoints.manifest import Manifest, from_defaults, write_manifest
from ..clock import Progress, ProgressCallback
from ..errors import MachineError, RequestError
from ..machine import free_disk, size_text
from ..request import GenerateRequest
from ..specs import RESOLUTIONS
from .random_weights import (
    FORMATS,
    TEXT_ENCODERS,
    TEXT_FORMATS,
    TRANSFORMERS,
    text_layout,
    transformer_layout,
    vae_layout,
    write_random,
)

# 40 words that the embedded model's tokenizer knows, so that it makes about as many tokens of them as umT5's would
PROMPT = (
    "a red circle moves right on a blue background while a large green square turns slowly in the middle and a small"
    " yellow star with a white ring moves up from the left to the right and grows very fast"
)
TOKENIZER_NOTE = "the embedded model's, 512 pieces"


@dataclass(frozen=True)
class Preset:
    """A model and what it is asked for. experts: from an image, as the A14B pair. vae: base width."""

    size: str
    format: str
    resolution: str
    experts: bool = False
    text: str = "xxl"
    vae: int = 96


PRESETS = {
    "1.3B-480p": Preset("1.3B", "bf16", "480p"),
    "14B-720p": Preset("14B", "int8_block", "720p"),
    "A14B-I2V-720p": Preset("14B", "int8_block", "720p", experts=True),
    "tiny": Preset("tiny", "bf16", "480p", text="tiny", vae=16),
    "tiny-I2V": Preset("tiny", "int8_block", "480p", experts=True, text="tiny", vae=16),
}


def find_preset(name: str, format: str | None, text_format: str) -> Preset:
    """A preset by name, its transformers in another format if one is given.

    Raises:
        RequestError: an unknown name or format.
    """
    for what, value, known in (
        ("preset", name, tuple(PRESETS)),
        ("format", format or FORMATS[0], FORMATS),
        ("the text encoder's format", text_format, TEXT_FORMATS),
    ):
        if value not in known:
            raise RequestError(f"{what} must be one of {', '.join(known)}, got '{value}'")
    return PRESETS[name] if format is None else replace(PRESETS[name], format=format)


def write_model(
    folder: Path,
    preset: Preset,
    text_format: str = "bf16",
    layers: int | None = None,
    device: torch.device | str = "cpu",
    report: ProgressCallback = lambda _: None,
) -> tuple[Manifest, Path]:
    """Write what is not there yet of a model, and its manifest into a folder of its own within `folder`.

    VAE and text encoder lie in `folder` itself, for all models in it.

    Args:
        layers: of transformers and text encoder, fewer than the true number for a trial; the text encoder then has 512
            rows of vocabulary.
        report: called as a file grows, its name as the stage.

    Returns:
        The manifest and the folder it is in.

    Raises:
        RequestError: a number of layers that there is not.
        MachineError: the disk has not the room.
        CheckpointError: a file cannot be written.
    """
    deepest = TRANSFORMERS[preset.size].num_layers
    if layers is not None and not 1 <= layers <= deepest:
        raise RequestError(f"layers must be from 1 to {deepest}, got {layers}")
    reduced = "" if layers is None else f"-{layers}-layers"
    config = replace(TRANSFORMERS[preset.size], in_dim=36 if preset.experts else 16)
    sizes = TEXT_ENCODERS[preset.text]
    if layers is not None:
        config = replace(config, num_layers=layers)
        sizes = replace(sizes, layers=layers, vocabulary=512)
    name = f"random-{'A' if preset.experts else ''}{preset.size}{'-I2V' if preset.experts else ''}"
    name += f"-{preset.format}{reduced}"
    home = folder / name
    roles = ("high_noise", "low_noise") if preset.experts else ("transformer",)
    files = {role: home / f"{role}.safetensors" for role in roles}
    files["vae"] = folder / f"vae-{preset.vae}.safetensors"
    files["text_encoder"] = folder / f"umt5-{preset.text}-{text_format}{reduced}.safetensors"
    layouts: dict[str, State] = {role: transformer_layout(config, preset.format) for role in roles}
    layouts["vae"], layouts["text_encoder"] = vae_layout(preset.vae), text_layout(sizes, text_format)

    missing = [role for role, path in files.items() if not path.exists()]
    needed = sum(value.nbytes for role in missing for value in layouts[role].values())
    make_folder(home)
    if needed > free_disk(folder):
        raise MachineError(
            f"{name} needs {size_text(needed)} in {folder}, which has {size_text(free_disk(folder))} free;"
            " name another --folder, or take --text-encoder fp8 or fewer --layers"
        )
    for seed, role in enumerate(missing):
        total, done = sum(value.nbytes for value in layouts[role].values()), 0

        def count(_: str, size: int, role: str = role, total: int = total) -> None:
            nonlocal done
            done += size
            report(Progress(files[role].stem, done, total, "bytes"))

        write_random(files[role], layouts[role], device, seed, count)
    if missing and torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what is measured runs in other processes
    files["tokenizer"] = folder / "tokenizer"
    shutil.copytree(EMBEDDED / "tiny" / "tokenizer", files["tokenizer"], dirs_exist_ok=True)
    family = "turbo-i2v" if preset.experts else "turbo-t2v"
    manifest = replace(from_defaults(name, family, files), resolution=preset.resolution)
    write_manifest(manifest, home)
    return manifest, home


def frame_size(request: GenerateRequest) -> tuple[int, int]:
    """Width and height in pixels that a request with a resolution or with both of them means."""
    if request.width is not None and request.height is not None:
        return request.width, request.height
    return RESOLUTIONS[request.resolution or "480p"][request.aspect_ratio]
