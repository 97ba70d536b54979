"""Writing videos with PyAV: mp4 (H.264), webm (VP9), gif, or a folder of PNG pictures. Whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Colorspace
from PIL import Image, PngImagePlugin

from ..errors import MediaError

FORMATS = (".mp4", ".webm", ".gif", ".png")
CRF = {".mp4": 18, ".webm": 31}
VP9_OPTIONS = {"b": "0", "row-mt": "1", "cpu-used": "4"}
BT709, LIMITED_RANGE = 1, 1  # FFmpeg's numbers
JPEG_QUALITY = 85


class Result(Protocol):
    """The parts of a generation's result that are written."""

    @property
    def videos(self) -> list[np.ndarray]: ...
    @property
    def fps(self) -> int: ...
    @property
    def settings(self) -> Mapping[str, object]: ...
    @property
    def stages(self) -> dict[str, float]: ...


def save_videos(result: Result, path: Path) -> list[Path]:
    """Write each sample under `path`, numbered when there are several, and note the seconds in `result.stages`."""
    with _write_stage(result):
        check_target(path)
        paths = [path]
        if len(result.videos) > 1:
            paths = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(result.videos))]
        metadata = _metadata(result)
        return [write_video(t, video, result.fps, metadata) for t, video in zip(paths, result.videos, strict=True)]


def save_side_by_side(result: Result, path: Path, crf: int) -> Path:
    """Write all samples as one picture wide as all of them, the way the official scripts do.

    The file is an mp4, or a JPEG (quality 85) where the samples have a single frame, whatever suffix `path` has; one
    without a suffix gets .mp4 or .jpg. The seconds go to `result.stages`.

    Args:
        crf: quality of the mp4, lower is better.

    Returns:
        The path written.
    """
    kind = ".jpg" if len(result.videos[0]) == 1 else ".mp4"
    with _write_stage(result):
        frames = np.concatenate(result.videos, axis=2)
        target = path if path.suffix else path.with_suffix(kind)
        return write_video(target, frames, result.fps, _metadata(result), crf, kind)


def _metadata(result: Result) -> dict[str, str]:
    return {"prompt": str(result.settings.get("prompt", "")), "settings": json.dumps(dict(result.settings))}


@contextmanager
def _write_stage(result: Result) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    result.stages["write"] += seconds
    result.stages["total"] += seconds


def check_target(path: Path, any_suffix: bool = False, num_frames: int = 1) -> None:
    """Make the folder and see that `path` can be written, before any work is done.

    Args:
        any_suffix: for writers that do not choose the format by the suffix.
        num_frames: per video. Several pictures (.png) go to a folder, which must not hold other things.

    Raises:
        MediaError: unknown suffix, or a folder that cannot be made or written.
    """
    if not any_suffix and path.suffix.lower() not in FORMATS:
        raise MediaError(f"{path.name or path} ends in '{path.suffix}'; videos end in {', '.join(FORMATS)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"the folder {path.parent} cannot be made: {error.strerror}") from error
    try:
        tempfile.TemporaryFile(dir=path.parent).close()  # really tried: for root, permissions alone say little
        is_folder = path.is_dir()
    except OSError as error:
        raise MediaError(f"{path} cannot be written ({error.strerror}); choose another with -o") from error
    if is_folder and (any_suffix or path.suffix.lower() != ".png"):
        raise MediaError(f"{path} is a folder; name a file")
    if path.suffix.lower() == ".png" and num_frames > 1 and not any_suffix:
        _check_picture_folder(path.with_suffix(""))


def write_video(
    path: Path,
    frames: np.ndarray,
    fps: int,
    metadata: Mapping[str, str] | None = None,
    crf: int | None = None,
    kind: str | None = None,
    loop: bool = True,
    optimize: bool = False,
) -> Path:
    """Write one video.

    Args:
        path: .mp4, .webm, .gif, or .png (a folder NAME/ of 00000.png, 00001.png …; a single frame is NAME.png itself).
            What an earlier run wrote there is replaced.
        frames: uint8 [T, H, W, 3].
        fps: frames per second.
        metadata: kept in the container's comment (mp4, webm, gif) or in each picture's text (png).
        crf: quality of mp4 and webm, lower is better; 18 and 31 by default.
        kind: the suffix of the format to write, whatever `path` ends in; also ".jpg", for a single frame.
        loop: whether a gif plays again and again. optimize: take longer for a smaller gif.

    Returns:
        What was written: `path`, or the folder of pictures.

    Raises:
        MediaError: the file cannot be written.
    """
    check_target(path, kind is not None, len(frames))
    suffix = kind or path.suffix.lower()
    metadata = metadata or {}
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part{suffix}")
    try:
        if suffix == ".png":
            return _write_pictures(partial, path, frames, metadata)
        if suffix == ".jpg":
            Image.fromarray(frames[0]).save(partial, quality=JPEG_QUALITY)
        elif suffix == ".gif":
            _write_gif(partial, frames, fps, metadata, loop, optimize)
        else:
            _write_container(partial, frames, fps, metadata, CRF[suffix] if crf is None else crf)
        partial.replace(path)
        return path
    except (OSError, FFmpegError) as error:
        raise MediaError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)


def _write_container(path: Path, frames: np.ndarray, fps: int, metadata: Mapping[str, str], crf: int) -> None:
    """H.264 or VP9, 4:2:0, converted and tagged as BT.709: untagged files are shown in other colours from 720p on."""
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise MediaError(f"{path.suffix} files need an even width and height, got {width}x{height}; write .png or .gif")
    codec = "libx264" if path.suffix == ".mp4" else "libvpx-vp9"
    options = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        container.metadata["title"] = metadata.get("prompt", "")[:500]
        container.metadata["comment"] = json.dumps(dict(metadata), ensure_ascii=False)
        stream: Any = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": str(crf), **(VP9_OPTIONS if codec == "libvpx-vp9" else {})}
        coder = stream.codec_context
        coder.colorspace = coder.color_primaries = coder.color_trc = BT709
        coder.color_range = LIMITED_RANGE
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _write_gif(
    path: Path, frames: np.ndarray, fps: int, metadata: Mapping[str, str], loop: bool, optimize: bool
) -> None:
    """A gif counts in hundredths of a second: rounded so that the whole keeps its length. Equal frames become one."""
    pictures = [Image.fromarray(frame) for frame in frames]
    ends = [round(100 * i / fps) for i in range(len(frames) + 1)]
    durations = [10 * (end - start) for start, end in pairwise(ends)]
    repeat: dict[str, Any] = {"loop": 0} if loop else {}
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=durations, optimize=optimize,
        comment=json.dumps(dict(metadata)).encode(), **repeat,
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
    partial.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(partial / f"{i:05d}.png", pnginfo=text)
    if folder.exists():
        earlier = partial.with_suffix(".old")
        folder.replace(earlier)
        partial.replace(folder)
        shutil.rmtree(earlier)
    else:
        partial.replace(folder)
    return folder


def _check_picture_folder(folder: Path) -> None:
    """Pictures of an earlier video may be replaced, as a file would be; anything else may not."""
    if not folder.exists():
        return
    if not folder.is_dir() or not all(re.fullmatch(r"\d{5}\.png", p.name) for p in folder.iterdir()):
        raise MediaError(f"{folder}, where the pictures would go, exists and holds other things; choose another name")
