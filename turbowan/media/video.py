"""Writing a video while its frames are being made: mp4, webm, gif, or a folder of pictures. Whole or not at all."""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import numpy as np
from av.error import FFmpegError

from ..errors import MediaError
from .formats import write_container, write_gif, write_jpeg, write_png

FORMATS = (".mp4", ".webm", ".gif", ".png")


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
    """Write one video whose frames are all there.

    Args:
        frames: uint8 [T, H, W, 3]. The others are those of `VideoWriter`.

    Returns:
        What was written: `path`, or the folder of pictures.

    Raises:
        MediaError: the file cannot be written.
    """
    with VideoWriter(path, len(frames), fps, metadata, crf, kind, loop, optimize) as writer:
        writer.add(frames)
        return writer.close()


class VideoWriter:
    """A video that a thread encodes while later frames are still being made.

    Used in a `with` statement: `add` takes the frames in order, in any portions, and never waits; `close` waits until
    they are encoded and gives the file its name. Until then it has a hidden one, and what an earlier run wrote under
    the name stays. On any error within the statement nothing is left.

    Args:
        path: .mp4, .webm, .gif, or .png (a folder NAME/ of 00000.png, 00001.png …; a single frame is NAME.png itself).
        num_frames: how many there will be.
        fps: frames per second.
        metadata: kept in the container's comment (mp4, webm, gif) or in each picture's text (png).
        crf: quality of mp4 and webm, lower is better, at the codec's default speed; without it, one that keeps up with
            a GPU's decoder for mp4, and 31 for webm.
        kind: the suffix of the format to write, whatever `path` ends in; also ".jpg", for a single frame.
        loop: whether a gif plays again and again. optimize: take longer for a smaller gif.

    Raises:
        MediaError: the file cannot be written: at once, or from `add` or `close` after the thread has failed.
    """

    def __init__(
        self,
        path: Path,
        num_frames: int,
        fps: int,
        metadata: Mapping[str, str] | None = None,
        crf: int | None = None,
        kind: str | None = None,
        loop: bool = True,
        optimize: bool = False,
    ) -> None:
        check_target(path, kind is not None, num_frames)
        self._suffix = kind or path.suffix.lower()
        self._num_frames, self._fps, self._metadata = num_frames, fps, metadata or {}
        self._crf, self._loop, self._optimize = crf, loop, optimize
        self._path = path
        self._target = path.with_suffix("") if self._suffix == ".png" and num_frames > 1 else path
        self._partial = path.with_name(f".{path.stem}.{os.getpid()}.part{self._suffix}")
        self._missing = num_frames
        self._closed = self._stopped = False
        self._error: BaseException | None = None
        self._parts: SimpleQueue[np.ndarray | None] = SimpleQueue()  # of any length: it holds no copies
        remove_leftovers(path, self._suffix)
        self._thread = Thread(target=self._encode, name=f"writes {path.name}", daemon=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self.stop()

    def add(self, frames: np.ndarray) -> None:
        """The next frames, uint8 [t, H, W, 3], which do not change any more."""
        if len(frames) > self._missing:
            raise ValueError(f"{len(frames)} more frames, where {self._missing} of {self._num_frames} are missing")
        self._raise_error()
        self._missing -= len(frames)
        self._parts.put(frames)
        if self._thread.ident is None:
            self._thread.start()

    def wait(self) -> None:
        """Until all frames are encoded; the file keeps its hidden name."""
        if self._missing:
            raise ValueError(f"{self._missing} of {self._num_frames} frames are missing")
        self._thread.join()
        self._raise_error()

    def close(self) -> Path:
        """`wait`, and give the file its name. Returns what was written: `path`, or the folder of pictures."""
        if not self._closed:
            try:
                self.wait()
                try:
                    _replace(self._partial, self._target)
                except OSError as error:
                    self._error = error
                    self._raise_error()
            except BaseException:
                self.stop()
                raise
            self._closed = True
        return self._target

    def stop(self) -> None:
        """Give up, unless the file has its name: the thread ends after the frame it is at, and nothing is left."""
        if self._closed:
            return
        self._stopped = True
        self._parts.put(None)
        if self._thread.ident is not None:
            self._thread.join()
        _remove(self._partial)

    def _raise_error(self) -> None:
        if self._error is None:
            return
        if isinstance(self._error, (OSError, FFmpegError)):
            reason = self._error.strerror or self._error
            raise MediaError(f"cannot write {self._path}: {reason}") from self._error
        raise self._error

    def _encode(self) -> None:
        """What the thread does."""
        try:
            frames = self._frames()
            if self._suffix == ".png":
                write_png(self._partial, frames, self._num_frames, self._metadata)
            elif self._suffix == ".jpg":
                write_jpeg(self._partial, frames)
            elif self._suffix == ".gif":
                write_gif(
                    self._partial, frames, self._num_frames, self._fps, self._metadata, self._loop, self._optimize
                )
            else:
                write_container(self._partial, frames, self._fps, self._metadata, self._crf)
        except BaseException as error:  # for the thread that adds frames
            self._error = error
            _remove(self._partial)

    def _frames(self) -> Iterator[np.ndarray]:
        missing = self._num_frames
        while missing:
            part = self._parts.get()
            for frame in () if part is None else part:
                if self._stopped:
                    break
                yield frame
            if part is None or self._stopped:
                raise InterruptedError("stopped")
            missing -= len(part)


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


def remove_leftovers(path: Path, suffix: str) -> None:
    """Delete what processes that were killed left of this video under hidden names."""
    for left in path.parent.glob(f".{glob.escape(path.stem)}.*.part{suffix}"):
        owner = re.fullmatch(r".*\.(\d+)(\.old)?\.part\.\w+", left.name)
        if owner and not _runs(int(owner[1])):
            _remove(left)


def _runs(process: int) -> bool:
    """Whether there is such a process, other than this one."""
    if os.name != "posix":
        return False  # Windows refuses to delete what a process has open
    try:
        os.kill(process, 0)  # asks, sends nothing
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return process != os.getpid()


def _replace(partial: Path, target: Path) -> None:
    """Rename; a folder in the target's place is deleted after it."""
    if target.is_dir():
        stem = partial.name.removesuffix(f".part{partial.suffix}")
        earlier = partial.with_name(f"{stem}.old.part{partial.suffix}")
        target.replace(earlier)
        partial.replace(target)
        shutil.rmtree(earlier)
    else:
        partial.replace(target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _check_picture_folder(folder: Path) -> None:
    """Pictures of an earlier video may be replaced, as a file would be; anything else may not."""
    if not folder.exists():
        return
    if not folder.is_dir() or not all(re.fullmatch(r"\d{5}\.png", p.name) for p in folder.iterdir()):
        raise MediaError(f"{folder}, where the pictures would go, exists and holds other things; choose another name")
