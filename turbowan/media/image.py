"""Reading the picture a video starts from, and writing sheets of frames to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import MediaError

ImageInput = str | Path | Image.Image | np.ndarray


def read_image(source: ImageInput) -> Image.Image:
    """An RGB picture from a path, a PIL image or an array; EXIF rotation applied, alpha laid over black.

    Args:
        source: an array is uint8 [H, W], [H, W, 3] or [H, W, 4], or float in 0..1.

    Raises:
        MediaError: missing, unreadable, empty, or with several frames.
    """
    name = str(source) if isinstance(source, str | Path) else "the image"
    try:
        if isinstance(source, str | Path):
            image: Image.Image = Image.open(source)
        elif isinstance(source, Image.Image):
            image = source
        else:
            image = _from_array(np.asarray(source))
        if getattr(image, "n_frames", 1) > 1:
            raise MediaError(f"{name} is animated ({image.n_frames} frames); give one still picture")
        image.load()
    except FileNotFoundError as error:
        raise MediaError(f"{name} does not exist") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{name} cannot be read as a picture ({' '.join(str(error).split())[:120]})") from error
    if image.width < 1 or image.height < 1:
        raise MediaError(f"{name} has no pixels ({image.width}x{image.height})")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        image.alpha_composite(rgba)
    return image.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise MediaError(f"an image array is [H, W], [H, W, 3] or [H, W, 4], got {list(array.shape)}")
    if array.dtype != np.uint8:
        array = (np.clip(array, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(array)


def to_tensor(image: Image.Image, height: int, width: int) -> Tensor:
    """Resize to the size given, with antialiasing and without cropping: float32 [1, 3, H, W] in -1..1.

    As in the official code the resize works on 8-bit values, bilinear.
    """
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)
    return (pixels.float() / 255 - 0.5).div(0.5).unsqueeze(0)


def contact_sheet(
    videos: Sequence[np.ndarray], labels: Sequence[str], columns: int = 4, frames: int = 4, width: int = 112
) -> Image.Image:
    """Some frames of each video side by side over its label, in a grid.

    Args:
        videos: uint8 [T, H, W, 3] each.
        labels: one line each.
        columns: videos per row. frames: pictures per video. width: of one picture, in pixels.
    """
    height = round(width * videos[0].shape[1] / videos[0].shape[2])
    cell_width, cell_height = frames * width + 6, height + 18
    rows = -(-len(videos) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), (24, 24, 24))
    draw = ImageDraw.Draw(sheet)
    for i, (video, label) in enumerate(zip(videos, labels, strict=True)):
        left, top = i % columns * cell_width, i // columns * cell_height
        for j in range(frames):
            frame = Image.fromarray(video[round(j * (len(video) - 1) / max(1, frames - 1))])
            sheet.paste(frame.resize((width, height)), (left + j * width, top))
        draw.text((left + 2, top + height + 2), label[: cell_width // 6], fill=(230, 230, 230))
    return sheet
