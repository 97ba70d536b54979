"""A model's files by name, folder or manifest, and whether they fit together."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from ..errors import CheckpointError
from ..models.transformer import TransformerConfig
from .detect import ROLES
from .load import outline, read
from .manifest import Manifest, check_manifest, find_in_folder, guess_manifest, read_manifest

EMBEDDED = Path(__file__).parent.parent / "assets"


def find_model(model: str | Path | None, files: dict[str, Path]) -> Manifest:
    """The manifest of a model by name, folder, manifest file or named files; named files stand before the model's."""
    if model is None and {"transformer", "high_noise", "low_noise"} & set(files):
        first = files.get("transformer") or files.get("high_noise") or files["low_noise"]
        return guess_manifest(first.stem, files)
    manifest = _find_named(str(model or "tiny"))
    if not files:
        return manifest
    own = dict(manifest.files)
    if {"transformer", "high_noise", "low_noise"} & set(files):
        own = {role: path for role, path in own.items() if role not in ("transformer", "high_noise", "low_noise")}
    manifest = replace(manifest, files={**own, **files})
    check_manifest(manifest, manifest.name)
    return manifest


def _find_named(model: str) -> Manifest:
    embedded = EMBEDDED / model
    if "/" not in model and (embedded / "turbowan.toml").exists():
        return read_manifest(embedded)
    path = Path(model).expanduser()
    if path.is_dir():
        return find_in_folder(path)
    if path.suffix == ".toml":
        return read_manifest(path)
    if path.exists():
        raise CheckpointError(f"{path} is a single file; name it as --transformer, with --vae and --text-encoder")
    known = ", ".join(sorted(p.parent.name for p in EMBEDDED.glob("*/turbowan.toml"))) or "none"
    raise CheckpointError(f"there is no model '{model}': it is no folder, no manifest and not embedded ({known})")


def check_parts(manifest: Manifest) -> TransformerConfig:
    """See from names, shapes and dtypes alone that all files are whole, serve their roles and fit each other.

    Returns:
        The transformers' sizes.

    Raises:
        CheckpointError: one cannot serve, or two do not fit together.
    """
    configs = {}
    for name, path in manifest.experts.items():
        configs[name] = outline(read(path, "transformer")[0], "transformer", str(path)).config
    config, *others = configs.values()
    if others and others[0] != config:
        sizes = [(f.name, getattr(config, f.name), getattr(others[0], f.name)) for f in fields(config)]
        differing = ", ".join(f"{name} {high} and {low}" for name, high, low in sizes if high != low)
        raise CheckpointError(f"the two experts differ ({differing}): {', '.join(map(str, manifest.experts.values()))}")
    files = manifest.files
    outline(read(files["vae"], "vae")[0], "vae", str(files["vae"]))
    encoder = outline(read(files["text_encoder"], "text_encoder")[0], "text_encoder", str(files["text_encoder"]))
    if encoder.width != config.text_dim:
        raise CheckpointError(
            f"the text encoder gives width {encoder.width}, but the transformer takes text of width {config.text_dim}"
        )
    if "image_encoder" in files:
        read(files["image_encoder"], "image_encoder")
    elif config.image_dim is not None:
        raise CheckpointError(f"{manifest.name} takes CLIP image tokens; give its {ROLES['image_encoder']} too")
    return config
