"""What a file is, from its keys and shapes: role, family, quantisation. Families we do not run are refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import State
from .scales import FP8, MARKER

ROLES = {
    "transformer": "diffusion transformer",
    "vae": "VAE",
    "text_encoder": "text encoder",
    "image_encoder": "CLIP image encoder",
}

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.", "module.")
_WRAPPER = "_checkpoint_wrapped_module."

# (a key that only this family has, its name)
_REFUSED_TRANSFORMERS = (
    (r"^vace_", "Wan VACE"),
    (r"^(pose_patch_embedding|face_adapter|motion_encoder|face_encoder)\.", "Wan 2.2 Animate"),
    (r"^(casual_audio_encoder|audio_injector|cond_encoder|audio_proj)\.", "Wan 2.2 S2V"),
    (r"(^img_emb\.emb_pos$|image_embedder\.pos_embed$)", "Wan 2.1 first-and-last-frame (FLF2V)"),
    (r"^(ref_conv|control_adapter)\.", "Wan Fun control"),
)
# other things people have in the same folders
_OTHERS = (
    (r"(lora_(up|down|A|B)|\.diff(_b)?$)", "a LoRA"),
    (r"^(model\.diffusion_model\.)?double_blocks\.", "a Flux or HunyuanVideo model"),
    (r"^model\.diffusion_model\.(input|output)_blocks\.", "a Stable Diffusion model"),
    (r"^(model\.diffusion_model\.)?joint_blocks\.", "a Stable Diffusion 3 model"),
    (r"^model\.layers\.", "a language model"),
)


@dataclass(frozen=True)
class Detected:
    """What a file holds.

    role: a key of ROLES. family: whose names and shapes it uses ("official", "wan", "diffusers", "comfy", "lightx2v",
    "turbowan", "transformers"). quantization: "none", "int8_block", "int8_row" or "fp8".
    """

    role: str
    family: str
    quantization: str

    def __str__(self) -> str:
        quantized = "" if self.quantization == "none" else f", {self.quantization}"
        return f"a Wan {ROLES[self.role]} ({self.family} layout{quantized})"


def strip_prefixes(state: Mapping[str, Tensor]) -> State:
    """Remove what wrappers put in front of or into every key."""
    stripped = {key.replace(_WRAPPER, ""): value for key, value in state.items()}
    for prefix in _PREFIXES:
        if any(key.startswith(prefix) for key in stripped):
            stripped = {key.removeprefix(prefix): value for key, value in stripped.items()}
    return stripped


def detect(state: Mapping[str, Tensor], name: str = "the file") -> Detected:
    """Tell role, family and quantisation.

    Args:
        state: keys and tensors (only shapes and dtypes are looked at).
        name: how to call the file in an error.

    Raises:
        CheckpointError: a family we recognise but do not run, or nothing we know.
    """
    comfy_prefix = any(key.startswith(("model.diffusion_model.", "diffusion_model.")) for key in state)
    keys = strip_prefixes(state)
    if "head.modulation" in keys or "condition_embedder.time_proj.weight" in keys:
        return _detect_transformer(keys, comfy_prefix, name)
    if "decoder.middle.0.residual.0.gamma" in keys or "decoder.mid_block.resnets.0.norm1.gamma" in keys:
        return _detect_vae(keys, name)
    if "token_embedding.weight" in keys and "norm.weight" in keys:
        return Detected("text_encoder", "wan", _quantization(keys))
    if "shared.weight" in keys and any(key.startswith("encoder.block.0.") for key in keys):
        family = "comfy" if "spiece_model" in keys or _is_comfy_quantized(keys) else "transformers"
        return Detected("text_encoder", family, _quantization(keys))
    if "visual.patch_embedding.weight" in keys:
        return Detected("image_encoder", "wan", "none")
    if "vision_model.embeddings.patch_embedding.weight" in keys:
        return Detected("image_encoder", "transformers", "none")
    for pattern, what in _OTHERS:
        if any(re.search(pattern, key) for key in state):
            raise CheckpointError(f"{name} is {what}, not a Wan model, VAE or text encoder")
    first = ", ".join(list(state)[:3])
    raise CheckpointError(f"{name} is no Wan checkpoint: {len(state)} tensors, the first ones {first}")


def _detect_transformer(keys: State, comfy_prefix: bool, name: str) -> Detected:
    for pattern, family in _REFUSED_TRANSFORMERS:
        if any(re.search(pattern, key) for key in keys):
            raise CheckpointError(f"{name} is of the family {family}, which turbowan does not run")
    head = keys.get("head.head.weight", keys.get("proj_out.weight"))
    if head is not None and head.shape[0] == 4 * 48:
        raise CheckpointError(f"{name} is Wan 2.2 TI2V-5B (48 latent channels), which turbowan does not run")
    quantization = _quantization(keys)
    patch = keys.get("patch_embedding.weight")
    if "condition_embedder.time_proj.weight" in keys:
        family = "diffusers"
    elif comfy_prefix or _is_comfy_quantized(keys):
        family = "comfy"
    elif quantization == "int8_row" or any(key.endswith(".weight_scale") for key in keys):
        family = "lightx2v"
    elif patch is not None and patch.ndim == 5:
        family = "wan"
    else:
        family = "turbowan" if any(".self_attn.proj_l." in key for key in keys) else "official"
    return Detected("transformer", family, quantization)


def _detect_vae(keys: State, name: str) -> Detected:
    family = "diffusers" if "decoder.conv_in.weight" in keys else "wan"
    first = keys.get("decoder.conv_in.weight" if family == "diffusers" else "decoder.conv1.weight")
    nested = any(key.startswith("decoder.upsamples.0.upsamples.") for key in keys)
    if nested or (first is not None and first.shape[1] == 48):
        raise CheckpointError(f"{name} is the Wan 2.2 VAE of the 5B model (48 channels), which turbowan does not run")
    return Detected("vae", family, _quantization(keys))


def _is_comfy_quantized(keys: Mapping[str, Tensor]) -> bool:
    return any(key == MARKER or key.endswith(".comfy_quant") for key in keys)


def _quantization(keys: Mapping[str, Tensor]) -> str:
    if any(key.endswith(".int8_weight") for key in keys):
        return "int8_block"
    dtypes = {value.dtype for key, value in keys.items() if key.endswith(".weight")}
    if torch.int8 in dtypes:
        return "int8_row"
    return "fp8" if dtypes & set(FP8) else "none"
