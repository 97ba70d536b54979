"""What an image-to-video model is told of the pictures it starts from, in ComfyUI's own form."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import comfy.utils
import node_helpers
import torch
from torch import Tensor

from ..errors import RequestError
from ..models.vae import LATENT_CHANNELS, SPATIAL_FACTOR, latent_frames

log = logging.getLogger(__name__)


def latent_shape(width: int, height: int, num_frames: int, batch: int = 1) -> tuple[int, ...]:
    return batch, LATENT_CHANNELS, latent_frames(num_frames), height // SPATIAL_FACTOR, width // SPATIAL_FACTOR


def empty_latent(width: int, height: int, num_frames: int, batch: int = 1) -> dict[str, Tensor]:
    """LATENT of zeros."""
    device = comfy.model_management.intermediate_device()
    return {"samples": torch.zeros(latent_shape(width, height, num_frames, batch), device=device)}


def condition(
    vae: Any, image: Tensor, width: int, height: int, num_frames: int, fit: tuple[str, str]
) -> dict[str, Tensor]:
    """The values that go into CONDITIONING: the latent of the pictures followed by grey, and 0 in the mask for theirs.

    Args:
        image: IMAGE [N, H, W, C] in 0..1: the video's first N frames.
        fit: how pictures of another size are brought to this one, as `comfy.utils.common_upscale` has it: a filter, and
            "center" (cut what is over) or "disabled" (stretch).

    Raises:
        RequestError: image or vae is nothing of the kind.
    """
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise RequestError(f"image: an IMAGE [pictures, height, width, 3] is wanted, got {got}")
    channels = getattr(vae, "latent_channels", None)
    if channels != LATENT_CHANNELS:
        raise RequestError(f"vae: the Wan 2.1 VAE ({LATENT_CHANNELS} channels) is wanted, got {channels or 'none'}")
    known = image[:num_frames, :, :, :3]
    if known.shape[1:3] != (height, width):
        known = comfy.utils.common_upscale(known.movedim(-1, 1), width, height, *fit).movedim(1, -1)
    clip = torch.full((num_frames, height, width, 3), 0.5)  # 0.0 to the VAE
    clip[: len(known)] = known
    latent = vae.encode(clip)
    mask = torch.ones(1, 1, *latent.shape[2:])
    mask[:, :, : latent_frames(len(known))] = 0
    return {"concat_latent_image": latent, "concat_mask": mask}


def only_first(image: Tensor) -> Tensor:
    """The first of several pictures, which is said."""
    if len(image) > 1:
        log.warning("turbowan: image holds %d pictures; the video starts from the first", len(image))
    return image[:1]


def told(conditioning: Any, values: dict[str, Any]) -> Any:
    """CONDITIONING with values set in every entry."""
    return node_helpers.conditioning_set_values(conditioning, values)
