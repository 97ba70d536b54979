"""From a generation to its files: names, what is written in them, and the seconds it took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from .video import VideoWriter, check_target, write_video


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


class VideoFiles:
    """The files of one generation, written while it decodes: what `Engine.generate` takes as its `sink`.

        with VideoFiles("cat.mp4") as files:
            result = engine.generate(request, sink=files)
            paths = files.close(result)

    Several samples get a number before the suffix. On any error within the statement no file is left.

    Raises:
        MediaError: a file cannot be written; known at once where the name tells, else from any method.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        check_target(self._path)
        self._writers: list[VideoWriter] = []

    def __enter__(self) -> VideoFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers:
            writer.stop()

    def begin(self, num_samples: int, num_frames: int, fps: int, settings: Mapping[str, object]) -> None:
        """What will come; settings, with the prompt, are kept in the files."""
        metadata = _metadata(settings)
        self._writers = [VideoWriter(path, num_frames, fps, metadata) for path in _numbered(self._path, num_samples)]

    def add(self, sample: int, frames: np.ndarray) -> None:
        """A sample's next frames, uint8 [t, H, W, 3], which do not change any more."""
        self._writers[sample].add(frames)

    def close(self, result: Result) -> list[Path]:
        """Wait until all are written, and note the seconds in `result.stages`. Returns the paths."""
        with _write_stage(result):
            for writer in self._writers:
                writer.wait()  # any of them may fail: then none gets its name
            return [writer.close() for writer in self._writers]


def save_videos(result: Result, path: Path) -> list[Path]:
    """Write each sample under `path`, numbered when there are several, and note the seconds in `result.stages`."""
    with _write_stage(result):
        check_target(path)
        metadata = _metadata(result.settings)
        targets = _numbered(path, len(result.videos))
        return [write_video(t, video, result.fps, metadata) for t, video in zip(targets, result.videos, strict=True)]


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
        return write_video(target, frames, result.fps, _metadata(result.settings), crf, kind)


def _numbered(path: Path, count: int) -> list[Path]:
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]


def _metadata(settings: Mapping[str, object]) -> dict[str, str]:
    return {"prompt": str(settings.get("prompt", "")), "settings": json.dumps(dict(settings))}


@contextmanager
def _write_stage(result: Result) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    result.stages["write"] += seconds
    result.stages["total"] += seconds
