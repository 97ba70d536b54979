"""Loader node of the text encoder."""

from __future__ import annotations

from typing import Any

from . import folders
from .inputs import combo


class TurboWanTextEncoderLoader:
    """CLIP for CLIPTextEncode, from umT5 in any layout."""

    DESCRIPTION = (
        "Loads the umT5 text encoder: the official models_t5_umt5-xxl-enc-bf16.pth, ComfyUI's files, or the embedded"
        " one. Texts are read as they stand: (brackets:1.2) are no weights here."
    )
    CATEGORY = "loaders"
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load_text_encoder"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        tip = "An umT5-xxl encoder, its tokenizer inside the file or beside it. 'tiny' fits the tiny models."
        return {"required": {"text_encoder": combo(folders.choices(folders.TEXT_ENCODERS), tip)}}

    @classmethod
    def VALIDATE_INPUTS(cls, text_encoder: str) -> bool | str:  # noqa: N802
        return folders.check(text_encoder, (folders.TEXT_ENCODERS,), "text_encoder")

    def load_text_encoder(self, text_encoder: str) -> tuple:
        return (load(text_encoder, "text_encoder"),)


def load(name: str, label: str) -> Any:
    """The CLIP of a choice. label: the input that made it, for errors."""
    path = folders.find(name, (folders.TEXT_ENCODERS,), label)
    from .clip import load_clip

    with folders.naming(label):
        return load_clip(path)
