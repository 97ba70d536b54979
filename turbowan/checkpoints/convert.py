"""From one layout to another: read, rename, write. Every tensor keeps its bits.

Input is memory-mapped and tensors are written one after another, so memory does not grow with the file.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, Note
from .comfy import SPIECE
from .detect import ROLES, Detected
from .diffusers import CONFIGS, WEIGHTS
from .families import WRITERS
from .files import PICKLED, SAFETENSORS, State, check_output, replacing, weight_files, write_tensors
from .load import embedded_tokenizer, outline, read
from .tokenizer import find_sentencepiece

# the quantisations each layout has a notation for
LAYOUTS = {
    "official": ("none", "int8_block"),
    "wan": ("none",),
    "diffusers": ("none",),
    "comfy": ("none", "fp8", "int8_row"),
    "turbowan": ("none", "int8_block", "fp8", "int8_row"),
}


def convert_checkpoint(source: Path, target: Path, to: str, tokenizer: Path | None = None) -> list[Path]:
    """Rewrite a transformer, VAE or text encoder in another layout.

    Args:
        source: a file, shard index or folder of any family we read.
        target: a file, `.safetensors` or `.pth`. For diffusers a folder, which gets the `config.json` that its
            `from_pretrained` needs, or a `.safetensors` file without one.
        to: a key of `LAYOUTS`: "official" is TurboDiffusion's, "wan" that of the original Wan files.
        tokenizer: a SentencePiece model, or a folder with a `spiece.model`, for a text encoder to comfy or turbowan.

    Returns:
        The files written.

    Raises:
        CheckpointError: unreadable, incomplete, or not representable in that layout. Nothing is written then.
    """
    check_target(source, target, to)
    _refuse_pipeline(source)
    state, found = read(source)
    _check_representable(source, found, to)
    model = outline(state, found.role, str(source))
    piece = _tokenizer_inside(source, found, to, tokenizer)
    converted = WRITERS[found.role, to](state) | piece
    return write_layout(target, to, found.role, model, lambda weights: write_tensors(weights, converted))


def write_layout(target: Path, to: str, role: str, model: Any, write: Callable[[Path], None]) -> list[Path]:
    """Write weights where a layout has them: in one file, or in diffusers' folder with a `config.json`.

    Args:
        target, to, role: as `convert_checkpoint` and `ROLES` have them; `check_target` comes first.
        model: the module whose sizes the `config.json` tells.
        write: writes the weights, under the layout's names, to the path it is given.

    Returns:
        The files written.

    Raises:
        CheckpointError: the place cannot be written.
    """
    if not _in_folder(target, to):
        write(target)
        return [target]
    weights, config = target / WEIGHTS[role], target / "config.json"
    with replacing(config) as partial:
        partial.write_text(json.dumps(CONFIGS[role](model), indent=2) + "\n")
        write(weights)
    return [weights, config]


def _in_folder(target: Path, to: str) -> bool:
    return to == "diffusers" and target.suffix not in SAFETENSORS + PICKLED


def check_target(source: Path, target: Path, to: str) -> None:
    """Raise CheckpointError unless weights made from `source` can be written to `target` in the layout `to`."""
    if to not in LAYOUTS:
        raise CheckpointError(f"there is no layout '{to}'; choose one of {', '.join(LAYOUTS)}")
    if not _in_folder(target, to):
        check_output(source, target)
        if to == "diffusers" and target.suffix in PICKLED:
            raise CheckpointError(f"diffusers reads no '{target.suffix}' files: name a folder or a .safetensors file")
    elif target.is_dir():
        others = sorted({path.name for path in weight_files(target)} - set(WEIGHTS.values()))
        if others:
            raise CheckpointError(f"{target} holds other weights ({others[0]}); name a new folder")
        if source.resolve() in (target.resolve(), *(target.resolve() / name for name in WEIGHTS.values())):
            raise CheckpointError(f"{target} is the input itself; name another output")


def _refuse_pipeline(source: Path) -> None:
    if (source / "model_index.json").exists():
        parts = sorted(path.name for path in source.iterdir() if path.is_dir() and weight_files(path))
        named = ", ".join(parts) or "without weights"
        raise CheckpointError(f"{source} is a whole pipeline ({named}); convert its parts one by one")


def _check_representable(source: Path, found: Detected, to: str) -> None:
    if found.role not in CONFIGS:
        raise CheckpointError(f"{source} is {found}; {', '.join(ROLES[role] for role in CONFIGS)} can be converted")
    if found.quantization not in LAYOUTS[to]:
        others = " or ".join(name for name, known in LAYOUTS.items() if found.quantization in known)
        raise CheckpointError(
            f"{source} is {found}, and the {to} layout has no place for {found.quantization} weights;"
            f" convert the full-precision file, or choose --to {others}"
        )


def _tokenizer_inside(source: Path, found: Detected, to: str, given: Path | None) -> State:
    """The tensor that carries the tokenizer in a text encoder's file, where the layout has it."""
    if found.role != "text_encoder" or to not in ("comfy", "turbowan"):
        if given is not None:
            raise CheckpointError("--tokenizer is for a text encoder converted to comfy or turbowan")
        if found.role == "text_encoder" and embedded_tokenizer(source) is not None:
            note = f"the tokenizer inside {source} is left out; the {to} layout cannot hold it"
            warnings.warn(note, Note, stacklevel=3)
        return {}
    if to == "turbowan" and given is None:
        piece = embedded_tokenizer(source)
    else:
        piece = find_sentencepiece(source, given)
        if piece is None:
            raise CheckpointError(
                f"ComfyUI wants the tokenizer inside the text encoder and none was found near {source};"
                " pass --tokenizer with umT5's spiece.model"
            )
    return {} if piece is None else {SPIECE: torch.frombuffer(bytearray(piece), dtype=torch.uint8)}
