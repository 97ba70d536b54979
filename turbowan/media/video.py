"""Writing videos with PyAV: mp4 (H.264), webm (VP9), gif, or a folder of PNG pictures. Whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, PngImagePlugin

from ..errors import MediaError

FORMATS = (".mp4", ".webm", ".gif", ".png")
CRF = {".mp4": 18, ".webm": 31}


class Result(Protocol):
    """The parts of a generation's result that are written."""

    videos: list[np.ndarray]
    fps: int
    settings: Mapping[str, object]
    stages: dict[str, float]


def save_videos(result: Result, path: Path) -> list[Path]:
    """Write each sample under `path`, numbered when there are several, and note the seconds in `result.stages`."""
    started = time.perf_counter()
    check_target(path)
    paths = [path]
    if len(result.videos) > 1:
        paths = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(result.videos))]
    metadata = {"prompt": str(result.settings.get("prompt", "")), "settings": json.dumps(dict(result.settings))}
    written = [write_video(t, video, result.fps, metadata) for t, video in zip(paths, result.videos, strict=True)]
    seconds = time.perf_counter() - started
    result.stages["write"] += seconds
    result.stages["total"] += seconds
    return written


def check_target(path: Path) -> None:
    """Make the folder and see that it can be written, before any work is done.

    Raises:
        MediaError: unknown suffix, or a folder that cannot be made or written.
    """
    if path.suffix.lower() not in FORMATS:
        raise MediaError(f"{path.name or path} ends in '{path.suffix}'; videos end in {', '.join(FORMATS)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"the folder {path.parent} cannot be made: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise MediaError(f"the folder {path.parent} cannot be written; choose another with -o")
    if path.is_dir() and path.suffix.lower() != ".png":
        raise MediaError(f"{path} is a folder; name a file")


def write_video(
    path: Path, frames: np.ndarray, fps: int, metadata: Mapping[str, str] | None = None, crf: int | None = None
) -> Path:
    """Write one video.

    Args:
        path: .mp4, .webm, .gif, or .png (a folder NAME/ of 00000.png, 00001.png …; a single frame is NAME.png itself).
        frames: uint8 [T, H, W, 3].
        fps: frames per second.
        metadata: kept in the container's comment (mp4, webm, gif) or in each picture's text (png).
        crf: quality of mp4 and webm, lower is better; 18 and 31 by default.

    Returns:
        What was written: `path`, or the folder of pictures.

    Raises:
        MediaError: the file cannot be written.
    """
    check_target(path)
    suffix = path.suffix.lower()
    metadata = metadata or {}
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part{suffix}")
    try:
        if suffix == ".png":
            return _write_pictures(partial, path, frames, metadata)
        if suffix == ".gif":
            _write_gif(partial, frames, fps, metadata)
        else:
            _write_container(partial, frames, fps, metadata, CRF[suffix] if crf is None else crf)
        partial.replace(path)
        return path
    except OSError as error:
        raise MediaError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)


def _write_container(path: Path, frames: Iterable[np.ndarray], fps: int, metadata: Mapping[str, str], crf: int) -> None:
    import av

    codec = "libx264" if path.suffix == ".mp4" else "libvpx-vp9"
    options = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        container.metadata["title"] = metadata.get("prompt", "")[:500]
        container.metadata["comment"] = json.dumps(dict(metadata), ensure_ascii=False)
        stream: Any = container.add_stream(codec, rate=fps)
        first = True
        for frame in frames:
            if first:
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": str(crf), **({"b": "0"} if codec == "libvpx-vp9" else {})}
                first = False
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: np.ndarray, fps: int, metadata: Mapping[str, str]) -> None:
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0,
        comment=json.dumps(dict(metadata)).encode(),
    )  # fmt: skip


def _write_pictures(partial: Path, path: Path, frames: np.ndarray, metadata: Mapping[str, str]) -> Path:
    text = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        text.add_itxt(key, value)
    if len(frames) == 1:
        Image.fromarray(frames[0]).save(partial, pnginfo=text)
        partial.replace(path)
        return path
    folder = path.with_suffix("")
    if folder.exists():
        raise MediaError(f"the folder {folder} for {len(frames)} pictures exists already; choose another name")
    partial.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(partial / f"{i:05d}.png", pnginfo=text)
    partial.replace(folder)
    return folder
