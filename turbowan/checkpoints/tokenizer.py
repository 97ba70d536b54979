"""Finding the tokenizer that belongs to a text encoder file."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..models.tokenizer import Tokenizer
from .load import embedded_tokenizer

HUB_NAME = "google/umt5-xxl"
_FILES = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
_BESIDE = ("tokenizer", "google/umt5-xxl", "umt5-xxl", "../tokenizer", "../google/umt5-xxl")


def find_tokenizer(text_encoder: Path, given: Path | None = None) -> Tokenizer:
    """The tokenizer: the one given, the one inside the file, a folder beside it, or the hub's cache, in this order.

    Args:
        text_encoder: the encoder's file or folder.
        given: a tokenizer folder or a SentencePiece file, or None.

    Raises:
        CheckpointError: none found; the line says what to download.
    """
    if given is not None:
        if not given.exists():
            raise CheckpointError(f"the tokenizer {given} does not exist")
        return _open(given)
    inside = embedded_tokenizer(text_encoder)
    if inside is not None:
        return Tokenizer.from_sentencepiece(inside)
    folder = text_encoder if text_encoder.is_dir() else text_encoder.parent
    for name in (*_BESIDE, "."):
        candidate = folder / name
        if any((candidate / file).exists() for file in _FILES):
            return _open(candidate)
    cached = _in_hub_cache()
    if cached is not None:
        return _open(cached)
    raise CheckpointError(
        f"no tokenizer for {text_encoder}: pass --tokenizer with a folder or spiece.model,"
        f" or run 'turbowan download {HUB_NAME.split('/')[1]}-tokenizer'"
    )


def _open(path: Path) -> Tokenizer:
    try:
        if path.is_file():
            return Tokenizer.from_sentencepiece(path.read_bytes())
        if not (path / "tokenizer.json").exists() and (path / "spiece.model").exists():
            return Tokenizer.from_sentencepiece((path / "spiece.model").read_bytes())
        return Tokenizer.from_folder(path)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path} is not a tokenizer folder or SentencePiece model ({reason})") from error


def _in_hub_cache() -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in _FILES[:2]:
        found = try_to_load_from_cache(HUB_NAME, name)
        if isinstance(found, str):
            return Path(found).parent
    return None
