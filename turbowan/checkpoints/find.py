"""A model's files by name, folder or manifest, and whether they fit together."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .detect import ROLES
from .load import outline, read
from .manifest import (
    FILE_NAME,
    TRANSFORMERS,
    Manifest,
    check_manifest,
    find_in_folder,
    guess_manifest,
    read_manifest,
)

EMBEDDED = Path(__file__).parent.parent / "assets"


def find_model(model: str | Path | None, files: dict[str, Path]) -> Manifest:
    """The manifest of a model by name, folder, manifest file or named files; named files stand before the model's."""
    if model is None and any(role in files for role in TRANSFORMERS):
        first = files.get("transformer") or files.get("high_noise") or files["low_noise"]
        return guess_manifest(first.stem, files)
    manifest = _find_named(str(model or default_model(False)))
    if not files:
        return manifest
    own = dict(manifest.files)
    if any(role in files for role in TRANSFORMERS):
        own = {role: path for role, path in own.items() if role not in TRANSFORMERS}
    manifest = replace(manifest, files={**own, **files})
    check_manifest(manifest, manifest.name)
    return manifest


def embedded_models() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.parent.name for path in EMBEDDED.glob(f"*/{FILE_NAME}"))


def default_model(has_image: bool) -> str:
    """The embedded model for a request without named files."""
    return "tiny-i2v" if has_image else "tiny"


def _find_named(model: str) -> Manifest:
    embedded = EMBEDDED / model
    if "/" not in model and (embedded / FILE_NAME).exists():
        return read_manifest(embedded)
    path = Path(model).expanduser()
    if path.is_dir():
        return find_in_folder(path)
    if path.suffix == ".toml":
        return read_manifest(path)
    if path.exists():
        raise CheckpointError(f"{path} is a single file; name it as --transformer, with --vae and --text-encoder")
    known = ", ".join(embedded_models()) or "none"
    raise CheckpointError(f"there is no model '{model}': it is no folder, no manifest and not embedded ({known})")


def check_parts(manifest: Manifest) -> dict[str, Any]:
    """See from names, shapes and dtypes alone that all files are whole, serve their roles and fit each other.

    Returns:
        The parts by role, as modules on the meta device: all their sizes, none of their values.

    Raises:
        CheckpointError: one cannot serve, or two do not fit together.
    """
    parts = {}
    for role, path in manifest.files.items():
        kind = "transformer" if role.endswith("_noise") else role
        if kind in ROLES:
            parts[role] = outline(read(path, kind)[0], kind, str(path))
    config, *others = (parts[role].config for role in TRANSFORMERS if role in parts)
    if others and others[0] != config:
        sizes = [(f.name, getattr(config, f.name), getattr(others[0], f.name)) for f in fields(config)]
        differing = ", ".join(f"{name} {one} and {other}" for name, one, other in sizes if one != other)
        raise CheckpointError(f"the two experts differ ({differing}): {', '.join(map(str, manifest.experts.values()))}")
    text, image = parts["text_encoder"].width, parts.get("image_encoder")
    if text != config.text_dim:
        raise CheckpointError(
            f"the text encoder gives width {text}, but the transformer takes text of width {config.text_dim}"
        )
    if config.image_dim is not None and image is None:
        raise CheckpointError(f"{manifest.name} takes CLIP image tokens; give its {ROLES['image_encoder']} too")
    if image is not None and config.image_dim not in (None, image.width):
        raise CheckpointError(
            f"the image encoder {manifest.files['image_encoder']} gives width {image.width},"
            f" but the transformer takes image tokens of width {config.image_dim}"
        )
    return parts
