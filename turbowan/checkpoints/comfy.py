"""ComfyUI's single files: prefixed names, 8-bit layers with scales, the tokenizer inside the text encoder."""

from . import diffusers, wan
from .files import State
from .scales import write_comfy_scales

SPIECE = "spiece_model"  # bytes of a SentencePiece model
PREFIX = "model.diffusion_model."


def write_transformer(state: State) -> State:
    return {PREFIX + key: value for key, value in write_comfy_scales(wan.write_transformer(state)).items()}


def read_text_encoder(state: State) -> State:
    return diffusers.read_text_encoder({key: value for key, value in state.items() if key != SPIECE})
