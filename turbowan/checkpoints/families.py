"""The readers and writers of each family, by role. Readers rename and reshape; `scales.py` reads scales after them."""

from __future__ import annotations

from collections.abc import Callable

from . import comfy, diffusers, official, wan
from .files import State

Rename = Callable[[State], State]


def _same(state: State) -> State:
    return dict(state)


READERS: dict[tuple[str, str], Rename] = {
    ("transformer", "official"): official.read_transformer,
    ("transformer", "turbowan"): official.read_transformer,
    ("transformer", "wan"): wan.read_transformer,
    ("transformer", "comfy"): comfy.read_transformer,
    ("transformer", "diffusers"): diffusers.read_transformer,
    ("transformer", "lightx2v"): wan.read_transformer,
    ("vae", "wan"): wan.read_vae,
    ("vae", "diffusers"): diffusers.read_vae,
    ("text_encoder", "wan"): wan.read_text_encoder,
    ("text_encoder", "comfy"): comfy.read_text_encoder,
    ("text_encoder", "transformers"): diffusers.read_text_encoder,
    ("image_encoder", "wan"): wan.read_image_encoder,
    ("image_encoder", "transformers"): _same,
}

WRITERS: dict[tuple[str, str], Rename] = {
    ("transformer", "official"): official.write_transformer,
    ("transformer", "turbowan"): _same,
    ("transformer", "wan"): wan.write_transformer,
    ("transformer", "comfy"): comfy.write_transformer,
    ("transformer", "diffusers"): diffusers.write_transformer,
    ("vae", "official"): wan.write_vae,
    ("vae", "wan"): wan.write_vae,
    ("vae", "turbowan"): _same,
    ("vae", "comfy"): comfy.write_vae,
    ("vae", "diffusers"): diffusers.write_vae,
    ("text_encoder", "official"): wan.write_text_encoder,
    ("text_encoder", "wan"): wan.write_text_encoder,
    ("text_encoder", "turbowan"): _same,
    ("text_encoder", "comfy"): comfy.write_text_encoder,
    ("text_encoder", "diffusers"): diffusers.write_text_encoder,
}
