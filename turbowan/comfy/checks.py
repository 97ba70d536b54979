"""Whether what is linked to a node fits together: refusals that name the input and the numbers."""

from __future__ import annotations

import logging
import re
from typing import Any

from ..errors import RequestError
from ..specs import FRAME_STEP, RESOLUTIONS, SIZE_STEP

log = logging.getLogger(__name__)

LATENT_CHANNELS, IMAGE_CHANNELS = 16, 36  # what text-to-video and image-to-video models take
CUSTOM = "custom"
SIZES = ("480", "480p", "512", "720", "720p", CUSTOM, "1080p")


def check_model(model: Any, label: str, text: Any, channels: int | None, text_label: str = "conditioning") -> None:
    """See that a MODEL is a Wan model for this task, and the text made for it.

    Args:
        text: CONDITIONING. channels: 16 for text to video, 36 for image to video, None for either.

    Raises:
        RequestError: it is not.
    """
    inside = getattr(getattr(model, "model", None), "diffusion_model", None)
    patch, embedding = getattr(inside, "patch_embedding", None), getattr(inside, "text_embedding", None)
    if patch is None or embedding is None:
        what = type(inside if inside is not None else model).__name__
        raise RequestError(f"{label}: a Wan model is wanted here, got {what}")
    got = patch.weight.shape[1]
    if channels is not None and got != channels:
        task = "image" if channels == IMAGE_CHANNELS else "text"
        raise RequestError(f"{label}: {task}-to-video models take {channels} channels, this one takes {got}")
    wanted, width = embedding[0].weight.shape[1], text[0][0].shape[-1]
    if width != wanted:
        raise RequestError(
            f"{text_label}: the text has width {width}, but {label} takes {wanted}"
            "; load the text encoder made for it (in CLIPLoader with the type 'wan')"
        )


def check_pair(high: Any, low: Any) -> None:
    """See that two experts are of one size and in their places.

    Raises:
        RequestError: they are not.
    """
    nets = [each.model.diffusion_model for each in (high, low)]
    sizes = []
    for net in nets:
        width, channels = net.patch_embedding.weight.shape[:2]
        sizes.append(f"width {width}, {len(net.blocks)} blocks, {channels} channels")
    if sizes[0] != sizes[1]:
        raise RequestError(f"high_noise_model and low_noise_model differ: {sizes[0]}, and {sizes[1]}")
    names = [getattr(each.model, "source", "") for each in (high, low)]
    words = [re.findall(r"(?<![a-z])(high|low)(?![a-z])", name.lower()) for name in names]
    if words == [["low"], ["high"]]:
        raise RequestError(
            f"high_noise_model and low_noise_model are interchanged: {names[0]} is the low-noise expert,"
            f" {names[1]} the high-noise one"
        )


def frame_count(asked: int, label: str) -> int:
    """The count rounded down to 4n+1, which is said."""
    frames = (asked - 1) // FRAME_STEP * FRAME_STEP + 1
    if frames != asked:
        log.warning("turbowan: %s is 4n+1; %d becomes %d", label, asked, frames)
    return frames


def check_size(width: int, height: int) -> None:
    """Raise RequestError unless both are multiples of 16."""
    for label, value in (("width", width), ("height", height)):
        if value % SIZE_STEP:
            nearest = max(SIZE_STEP, round(value / SIZE_STEP) * SIZE_STEP)
            raise RequestError(f"{label} must be a multiple of {SIZE_STEP} pixels, got {value} (nearest: {nearest})")


def choose_size(resolution: str, aspect_ratio: str, width: int, height: int) -> tuple[int, int]:
    """(width, height) of a name in the table, or of a custom size rounded to the nearest multiples of 16."""
    if resolution != CUSTOM:
        return RESOLUTIONS[resolution][aspect_ratio]
    rounded = tuple(max(SIZE_STEP, round(value / SIZE_STEP) * SIZE_STEP) for value in (width, height))
    if rounded != (width, height):
        log.warning("turbowan: %dx%d becomes %dx%d, multiples of %d", width, height, *rounded, SIZE_STEP)
    return rounded[0], rounded[1]


def check_prompt(prompt: str, label: str) -> None:
    """Raise RequestError where there is nothing to read."""
    if not prompt.strip():
        raise RequestError(f"{label} is empty; describe the video in a few words")
