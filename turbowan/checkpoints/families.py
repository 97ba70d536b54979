"""The readers and writers of each family, by role: they rename and reshape. `dict` stands where the names are ours.

`load.read` takes wrappers' prefixes off before a reader, and reads scales after it.
"""

from __future__ import annotations

from collections.abc import Callable

from . import comfy, diffusers, official, wan
from .files import State
from .scales import write_comfy_scales

Rename = Callable[[State], State]

READERS: dict[tuple[str, str], Rename] = {
    ("transformer", "official"): official.read_transformer,
    ("transformer", "turbowan"): official.read_transformer,
    ("transformer", "wan"): wan.read_transformer,
    ("transformer", "comfy"): wan.read_transformer,
    ("transformer", "diffusers"): diffusers.read_transformer,
    ("transformer", "lightx2v"): wan.read_transformer,
    ("vae", "wan"): dict,
    ("vae", "diffusers"): diffusers.read_vae,
    ("text_encoder", "wan"): wan.read_text_encoder,
    ("text_encoder", "comfy"): comfy.read_text_encoder,
    ("text_encoder", "transformers"): diffusers.read_text_encoder,
    ("image_encoder", "wan"): wan.read_image_encoder,
    ("image_encoder", "transformers"): dict,
}

WRITERS: dict[tuple[str, str], Rename] = {
    ("transformer", "official"): official.write_transformer,
    ("transformer", "turbowan"): dict,
    ("transformer", "wan"): wan.write_transformer,
    ("transformer", "comfy"): comfy.write_transformer,
    ("transformer", "diffusers"): diffusers.write_transformer,
    ("vae", "official"): dict,
    ("vae", "wan"): dict,
    ("vae", "turbowan"): dict,
    ("vae", "comfy"): dict,
    ("vae", "diffusers"): diffusers.write_vae,
    ("text_encoder", "official"): wan.write_text_encoder,
    ("text_encoder", "wan"): wan.write_text_encoder,
    ("text_encoder", "turbowan"): dict,
    ("text_encoder", "comfy"): write_comfy_scales,
    ("text_encoder", "diffusers"): dict,
}
