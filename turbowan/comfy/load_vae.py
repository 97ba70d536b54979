"""Loader node of the VAE."""

from __future__ import annotations

from typing import Any

from . import folders
from .inputs import combo

KINDS = (folders.VAES, folders.TRANSFORMERS)


class TurboWanVAELoader:
    """VAE from a file: a real one, un-normalised on the outside as ComfyUI's are."""

    DESCRIPTION = "Loads a Wan 2.1 VAE (.pth or .safetensors). Works in every node that takes a VAE."
    CATEGORY = "video/turbodiffusion"
    RETURN_TYPES = ("VAE",)
    RETURN_NAMES = ("vae",)
    FUNCTION = "load_vae"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        tip = "A Wan 2.1 VAE: Wan2.1_VAE.pth or wan_2.1_vae.safetensors. 'tiny' is inside the package."
        return {"required": {"vae_name": combo(folders.vae_choices(), tip, "Wan2.1_VAE.pth")}}

    @classmethod
    def VALIDATE_INPUTS(cls, vae_name: str) -> bool | str:  # noqa: N802
        return folders.check(vae_name, KINDS, "vae_name")

    def load_vae(self, vae_name: str) -> tuple:
        return (load(vae_name, "vae_name"),)


def load(name: str, label: str) -> Any:
    """The VAE of a choice. label: the input that made it, for errors."""
    path = folders.find(name, KINDS, label)
    from .vae import VAE

    with folders.naming(label):
        return VAE(path)
