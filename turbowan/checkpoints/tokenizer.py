"""Finding the tokenizer that belongs to a text encoder file."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..models.tokenizer import Tokenizer
from .load import embedded_tokenizer

HUB_NAME = "google/umt5-xxl"
SENTENCEPIECE = "spiece.model"
_FILES = ("tokenizer.json", SENTENCEPIECE, "sentencepiece.bpe.model", "tokenizer.model")
_BESIDE = ("tokenizer", "google/umt5-xxl", "umt5-xxl", "../tokenizer", "../google/umt5-xxl", ".")


def find_tokenizer(text_encoder: Path, given: Path | None = None) -> Tokenizer:
    """The tokenizer: the one given, the one inside the file, a folder beside it, or the hub's cache, in this order.

    Args:
        text_encoder: the encoder's file or folder.
        given: a tokenizer folder or a SentencePiece file, or None.

    Raises:
        CheckpointError: none found; the line says what to download.
    """
    inside = None if given is not None else embedded_tokenizer(text_encoder)
    if inside is not None:
        return Tokenizer.from_sentencepiece(inside)
    found = _find(text_encoder, given, _FILES)
    if found is None:
        raise CheckpointError(
            f"no tokenizer for {text_encoder}: pass --tokenizer with a folder or {SENTENCEPIECE},"
            f" or run 'turbowan download umt5-xxl-tokenizer -o {_folder(text_encoder)}'"
        )
    return _open(found)


def find_sentencepiece(text_encoder: Path, given: Path | None = None) -> bytes | None:
    """The same search for the bytes of a SentencePiece model, which ComfyUI's files carry; None where there is none.

    Raises:
        CheckpointError: the one given is not there, or is not a SentencePiece model.
    """
    inside = None if given is not None else embedded_tokenizer(text_encoder)
    if inside is not None:
        return inside
    found = _find(text_encoder, given, (SENTENCEPIECE,))
    if found is None:
        return None
    path = found / SENTENCEPIECE if found.is_dir() else found
    if not path.exists():
        raise CheckpointError(f"{found} holds no {SENTENCEPIECE}")
    _open(path)
    return path.read_bytes()


def _find(text_encoder: Path, given: Path | None, names: tuple[str, ...]) -> Path | None:
    if given is not None:
        if not given.exists():
            raise CheckpointError(f"the tokenizer {given} does not exist")
        return given
    folder = _folder(text_encoder)
    for beside in _BESIDE:
        if any((folder / beside / name).exists() for name in names):
            return folder / beside
    return in_hub_cache(names)


def _folder(text_encoder: Path) -> Path:
    return text_encoder if text_encoder.is_dir() else text_encoder.parent


def _open(path: Path) -> Tokenizer:
    try:
        if path.is_file():
            return Tokenizer.from_sentencepiece(path.read_bytes())
        if not (path / "tokenizer.json").exists() and (path / SENTENCEPIECE).exists():
            return Tokenizer.from_sentencepiece((path / SENTENCEPIECE).read_bytes())
        return Tokenizer.from_folder(path)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path} is not a tokenizer folder or SentencePiece model ({reason})") from error


def in_hub_cache(names: tuple[str, ...] = _FILES) -> Path | None:
    """The folder of the tokenizer in the hub's cache on this machine, if it holds one of these files."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        found = try_to_load_from_cache(HUB_NAME, name)
        if isinstance(found, str):
            return Path(found).parent
    return None
