"""How frames become files: H.264 and VP9 by PyAV, gif, jpeg and png by Pillow.

Each writer takes the frames, uint8 [H, W, 3], as they come and is done soon after the last of them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter
from PIL import Image, PngImagePlugin

from ..errors import MediaError

# x264's "veryfast" does half of the default preset's work or less, and looks 10 frames ahead instead of 40: less is
# left to do after the last frame. Size and error at 16 are about those of the default preset at 18.
H264_QUALITY = {"crf": "16", "preset": "veryfast"}
VP9_QUALITY = {"crf": "31"}
VP9_OPTIONS = {"b": "0", "row-mt": "1", "cpu-used": "4"}
BT709, LIMITED_RANGE = 1, 1  # FFmpeg's numbers
JPEG_QUALITY = 85


def write_container(
    path: Path, frames: Iterator[np.ndarray], fps: int, metadata: Mapping[str, str], crf: int | None
) -> None:
    """H.264 or VP9, 4:2:0, converted and tagged as BT.709: untagged files are shown in other colours from 720p on.

    Args:
        crf: of the codec's default preset, lower is better; None for our own choice of both.
    """
    first = next(frames)
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise MediaError(f"{path.suffix} files need an even width and height, got {width}x{height}; write .png or .gif")
    h264 = path.suffix == ".mp4"
    with av.open(str(path), "w", options={"movflags": "+faststart"} if h264 else {}) as container:
        container.metadata["title"] = metadata.get("prompt", "")[:500]
        container.metadata["comment"] = json.dumps(dict(metadata), ensure_ascii=False)
        stream: Any = container.add_stream("libx264" if h264 else "libvpx-vp9", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        quality = {"crf": str(crf)} if crf is not None else H264_QUALITY if h264 else VP9_QUALITY
        stream.options = quality if h264 else {**quality, **VP9_OPTIONS}
        coder = stream.codec_context
        coder.thread_type = "AUTO"  # whole frames beside each other; PyAV's default is parts of one
        coder.colorspace = coder.color_primaries = coder.color_trc = BT709
        coder.color_range = LIMITED_RANGE
        convert = VideoReformatter()
        for frame in chain([first], frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = convert.reformat(picture, format="yuv420p", dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_gif(
    path: Path,
    frames: Iterator[np.ndarray],
    num_frames: int,
    fps: int,
    metadata: Mapping[str, str],
    loop: bool,
    optimize: bool,
) -> None:
    """A gif counts in hundredths of a second: rounded so that the whole keeps its length. Equal frames become one."""
    pictures = map(Image.fromarray, frames)
    ends = [round(100 * i / fps) for i in range(num_frames + 1)]
    durations = [10 * (end - start) for start, end in pairwise(ends)]
    repeat: dict[str, Any] = {"loop": 0} if loop else {}
    next(pictures).save(
        path, save_all=True, append_images=pictures, duration=durations, optimize=optimize,
        comment=json.dumps(dict(metadata)).encode(), **repeat,
    )  # fmt: skip


def write_jpeg(path: Path, frames: Iterator[np.ndarray]) -> None:
    """The only frame."""
    Image.fromarray(next(frames)).save(path, quality=JPEG_QUALITY)


def write_png(path: Path, frames: Iterator[np.ndarray], num_frames: int, metadata: Mapping[str, str]) -> None:
    """A picture; a folder of pictures, 00000.png and on, where there are several frames."""
    text = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        text.add_itxt(key, value)
    if num_frames == 1:
        Image.fromarray(next(frames)).save(path, pnginfo=text)
        return
    path.mkdir()

    def write(i: int, frame: np.ndarray) -> None:
        Image.fromarray(frame).save(path / f"{i:05d}.png", pnginfo=text)

    with ThreadPoolExecutor() as pool:
        try:
            begun: deque[Future[None]] = deque()
            for i, frame in enumerate(frames):
                begun.append(pool.submit(write, i, frame))
                while begun and begun[0].done():
                    begun.popleft().result()  # an error ends the work now, not after the last frame
            for written in begun:
                written.result()
        finally:
            pool.shutdown(cancel_futures=True)
