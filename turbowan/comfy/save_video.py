"""The node that writes a video."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .inputs import combo, link, switch, text, whole

FOLDER = "turbodiffusion_videos"  # in ComfyUI's output folder, as published
CRF = {"mp4": (34, 12), "webm": (46, 18)}  # at quality 1 and 10


class TurboDiffusionSaveVideo:
    """Frames to a file in ComfyUI's output folder, shown in the node."""

    DESCRIPTION = "Writes frames as mp4 (H.264), webm (VP9) or gif, numbered, with the workflow inside."
    CATEGORY = "video/turbodiffusion"
    RETURN_TYPES = ()
    FUNCTION = "save_video"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        prefix = (
            f"Name of the file, put in output/{FOLDER}; a number follows. May name a subfolder, and hold ComfyUI's"
            " %date:yyyy-MM-dd% and the like."
        )
        kinds = "mp4 plays everywhere; webm is smaller; gif has 256 colours."
        return {
            "required": {
                "frames": link("IMAGE", "The video's frames, in order."),
                "filename_prefix": text("turbodiffusion", prefix),
                "fps": whole(24, 1, 60, "Frames per second. Wan's own rate is 16."),
                "format": combo(("mp4", "gif", "webm"), kinds, "mp4"),
            },
            "optional": {
                "quality": whole(8, 1, 10, "Of mp4 and webm: 1 smallest file, 10 best picture; 8 recommended."),
                "optimize_gif": switch(True, "gif: spend time on a smaller file."),
                "loop": switch(True, "gif: play again and again."),
            },
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:  # noqa: N802
        return float("nan")  # a new file on every run

    def save_video(
        self,
        frames: Any,
        filename_prefix: str,
        fps: int,
        format: str,
        quality: int = 8,
        optimize_gif: bool = True,
        loop: bool = True,
        prompt: Any = None,
        extra_pnginfo: Any = None,
    ) -> dict[str, Any]:
        import folder_paths

        from ..media.video import write_video

        pixels = to_pixels(frames, even=format != "gif")
        prefix = f"{FOLDER}/{safe_prefix(filename_prefix)}"
        height, width = pixels.shape[1:3]
        folder, name, number, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory(), width, height
        )
        path = free_path(Path(folder), name, number, format)
        metadata = {"workflow": json.dumps((extra_pnginfo or {}).get("workflow")), "prompt": json.dumps(prompt)}
        crf = None if format == "gif" else crf_of(format, quality)
        write_video(path, pixels, fps, metadata, crf, loop=loop, optimize=optimize_gif)
        shown = {"filename": path.name, "subfolder": subfolder, "type": "output", "format": f"video/{format}"}
        return {"ui": {"images": [shown], "animated": (True,), "videos": [shown], "gifs": [shown]}}


def to_pixels(frames: Any, even: bool) -> Any:
    """IMAGE [T, H, W, 3 or 4] in 0..1 to uint8 [T, H, W, 3]; values outside are clipped, alpha is dropped.

    Args:
        even: repeat the last row or column of an odd size: mp4 and webm hold even ones only.

    Raises:
        MediaError: frames that are no video.
    """
    import torch

    from ..errors import MediaError

    if not isinstance(frames, torch.Tensor) or frames.ndim != 4 or frames.shape[-1] not in (3, 4) or 0 in frames.shape:
        got = list(frames.shape) if isinstance(frames, torch.Tensor) else type(frames).__name__
        raise MediaError(f"frames: a video is an IMAGE [frames, height, width, 3], got {got}")
    pixels = (frames[..., :3].float().nan_to_num().clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu()
    if even and pixels.shape[1] % 2:
        pixels = torch.cat([pixels, pixels[:, -1:]], dim=1)
    if even and pixels.shape[2] % 2:
        pixels = torch.cat([pixels, pixels[:, :, -1:]], dim=2)
    return pixels.contiguous().numpy()


def safe_prefix(prefix: str) -> str:
    """The prefix with either system's separators understood.

    Raises:
        MediaError: it would leave the output folder, or is empty.
    """
    from ..errors import MediaError

    parts = [part for part in re.split(r"[/\\]", prefix.strip()) if part not in ("", ".")]
    if not parts or ".." in parts or re.match(r"^([/\\]|[A-Za-z]:)", prefix.strip()):
        raise MediaError(f"filename_prefix must be a name inside the output folder, got '{prefix}'")
    return "/".join(parts)


def crf_of(format: str, quality: int) -> int:
    """The encoder's constant rate factor (lower is better) for a quality of 1..10."""
    worst, best = CRF[format]
    return round(worst + (best - worst) * (quality - 1) / 9)


def free_path(folder: Path, name: str, number: int, format: str) -> Path:
    """A numbered file that is not there yet; ComfyUI's own numbers know pictures only."""
    while (path := folder / f"{name}_{number:05}_.{format}").exists():
        number += 1
    return path
