"""Reading the picture a video starts from, and writing sheets of frames to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import MediaError

ImageInput = str | Path | Image.Image | np.ndarray


def read_image(source: ImageInput) -> Image.Image:
    """An RGB picture of 8 bits from a path, a PIL image or an array.

    EXIF rotation is applied. Transparent parts are laid over black. Sixteen bits are scaled to eight. Of a phone's
    multi-picture JPEG (MPO) the first picture, which viewers show, is taken; animated pictures are refused.

    Args:
        source: an array is [H, W], [H, W, 3] or [H, W, 4]: uint8, uint16, or float in 0..1.

    Raises:
        MediaError: missing, unreadable, too large, without pixels, or with several frames.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the image")
    if not isinstance(source, str | Path):
        return _decode(_from_array(np.asarray(source)), "the image")
    path = Path(source)
    try:
        size = path.stat().st_size
        if size == 0:
            raise MediaError(f"{path} is empty (0 bytes); give a PNG, JPEG or WebP file")
        with Image.open(path) as image:
            return _decode(image, str(path))
    except FileNotFoundError as error:
        raise MediaError(f"{path} does not exist") from error
    except UnidentifiedImageError as error:
        raise MediaError(f"{path} ({size:,} bytes) is not a picture; give a PNG, JPEG or WebP file") from error
    except Exception as error:
        raise _refusal(str(path), error) from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":
            raise MediaError(f"{name} is animated ({frames} frames); give one still picture")
        if image.width < 1 or image.height < 1:
            raise MediaError(f"{name} has no pixels ({image.width}x{image.height})")
        image.load()
        upright = _eight_bits(ImageOps.exif_transpose(image))
        if "transparency" not in upright.info and upright.mode not in ("RGBA", "RGBa", "LA", "La", "PA"):
            return upright.convert("RGB")
        rgba = upright.convert("RGBA")
    except Exception as error:
        raise _refusal(name, error) from error
    black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
    black.alpha_composite(rgba)
    return black.convert("RGB")


def _refusal(name: str, error: Exception) -> MediaError:
    """One line for whatever a decoder raised: on damaged data that can be any exception."""
    if isinstance(error, MediaError):
        return error
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120] or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return MediaError(f"{name} is too large; make it smaller ({reason})")
    return MediaError(f"{name} cannot be read as a picture; it may be damaged or cut off ({reason})")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips its wider greyscale modes ("I;16" of a 16-bit PNG, "F" of floats) when converting; scale them."""
    if image.mode.startswith("I"):
        return _from_array(np.asarray(image).clip(0, 65535).astype(np.uint16))
    if image.mode == "F":
        return _from_array(np.asarray(image))
    return image


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise MediaError(f"an image array is [H, W], [H, W, 3] or [H, W, 4], got {list(array.shape)}")
    if array.dtype == np.uint8:
        return Image.fromarray(array)
    if array.dtype == np.uint16:
        return Image.fromarray(((array.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if not np.issubdtype(array.dtype, np.floating):
        raise MediaError(f"an image array is uint8, uint16 or float, got {array.dtype}")
    low, high = float(array.min()), float(array.max())
    if not (low >= -0.01 and high <= 1.01):  # also refuses NaN
        raise MediaError(f"a float image array is in 0..1, got {low:.4g} to {high:.4g}")
    return Image.fromarray((array.clip(0, 1) * 255 + 0.5).astype(np.uint8))


def to_tensor(image: Image.Image, height: int, width: int) -> Tensor:
    """Resize to the size given, with antialiasing and without cropping: float32 [1, 3, H, W] in -1..1.

    As in the official code the resize works on 8-bit values, bilinear.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
    resized = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return (resized.float() / 255 - 0.5).div(0.5)


def contact_sheet(
    videos: Sequence[np.ndarray], labels: Sequence[str], columns: int = 4, frames: int = 4, width: int = 112
) -> Image.Image:
    """Some frames of each video side by side over its label, in a grid.

    Args:
        videos: uint8 [T, H, W, 3] each.
        labels: one line each.
        columns: videos per row, at most. frames: pictures per video, evenly spaced. width: of one picture, in pixels.
    """
    columns = min(columns, len(videos))
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
