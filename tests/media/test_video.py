"""Every format is written and decoded again; what cannot be written says so and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from turbowan.errors import MediaError
from turbowan.media.video import VideoWriter, check_target, write_video

CLOSE = 25.0  # dB; most of what is lost is the sharpness of colours in 4:2:0, over clips of 96x64


# Containers


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "h264"), (".webm", "vp9")])
@pytest.mark.parametrize(("frames", "fps"), [(1, 16), (2, 24), (7, 12), (33, 16)])
def test_a_container_gives_its_frames_back(tmp_path, suffix, codec, frames, fps, clip, decode, psnr, files_in):
    video = clip(frames)
    path = write_video(tmp_path / f"v{suffix}", video, fps)
    decoded, rate = decode(path)
    assert decoded.shape == video.shape
    assert rate == fps
    assert psnr(decoded, video) > CLOSE
    if frames > 2:  # in order: each frame is nearest to its own original
        assert psnr(decoded[0], video[0]) > psnr(decoded[0], video[-1])
        assert psnr(decoded[-1], video[-1]) > psnr(decoded[-1], video[0])
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name in (codec, f"lib{codec}")
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        assert container.duration is not None
        assert container.duration / av.time_base == pytest.approx(frames / fps, abs=0.02)
    assert files_in(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_colours_are_tagged_and_right(tmp_path, suffix, decode):
    """Flat colours come back within a few levels, by the matrix that the file names."""
    colours = np.array([(220, 30, 30), (30, 60, 224), (250, 230, 40), (30, 166, 50), (128, 128, 128)], np.uint8)
    video = np.repeat(np.repeat(colours, 64, axis=0)[None, None], 64, axis=1).repeat(3, axis=0)
    path = write_video(tmp_path / f"c{suffix}", video, 16)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        coder = container.streams.video[0].codec_context
        assert (frame.colorspace, coder.color_primaries, coder.color_trc, coder.color_range) == (1, 1, 1, 1)
        seen = frame.to_ndarray(format="rgb24")[32, 32::64].astype(int)
    assert np.abs(seen - colours).max() <= 4


@pytest.mark.parametrize(("loop", "times"), [(True, 0), (False, None)])
def test_a_gif_plays_again_or_once(tmp_path, loop, times, clip):
    with Image.open(write_video(tmp_path / "g.gif", clip(5), 10, loop=loop, optimize=True)) as picture:
        assert picture.info.get("loop") == times
        assert picture.n_frames == 5


def test_quality_follows_crf(tmp_path, clip, decode, psnr):
    video = clip(9)[..., :1].repeat(3, axis=3)  # grey loses nothing to 4:2:0
    sizes = [write_video(tmp_path / f"{crf}.mp4", video, 16, crf=crf).stat().st_size for crf in (5, 18, 40)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert psnr(decode(tmp_path / "5.mp4")[0], video) > psnr(decode(tmp_path / "40.mp4")[0], video) + 3


def test_mp4_plays_while_it_loads(tmp_path, clip):
    data = write_video(tmp_path / "v.mp4", clip(9), 16).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_containers_need_even_sizes(tmp_path, suffix, files_in):
    with pytest.raises(MediaError, match="31x17"):
        write_video(tmp_path / f"v{suffix}", np.zeros((2, 17, 31, 3), np.uint8), 16)
    assert files_in(tmp_path) == []


# Pictures


@pytest.mark.parametrize(("frames", "fps"), [(1, 16), (6, 16), (33, 16), (25, 24), (10, 30)])
def test_a_gif_keeps_frames_and_length(tmp_path, frames, fps, clip, psnr):
    video = clip(frames)
    path = write_video(tmp_path / "v.gif", video, fps)
    seen, durations = [], []
    with Image.open(path) as gif:
        for i in range(getattr(gif, "n_frames", 1)):
            gif.seek(i)
            gif.load()
            durations.append(gif.info.get("duration", 0))
            seen.append(np.asarray(gif.convert("RGB")))
        assert gif.info.get("loop", 0) == 0
    assert len(seen) == frames
    assert psnr(np.stack(seen), video) > 27
    if frames > 1:
        assert sum(durations) == pytest.approx(1000 * frames / fps, abs=10)


def test_pngs_are_exact(tmp_path, clip, files_in):
    video = clip(5, 17, 31)  # any size
    folder = write_video(tmp_path / "new" / "v.png", video, 16)
    assert folder == tmp_path / "new" / "v"
    assert files_in(folder) == [f"{i:05d}.png" for i in range(5)]
    seen = np.stack([np.asarray(Image.open(folder / f"{i:05d}.png")) for i in range(5)])
    assert np.array_equal(seen, video)
    single = write_video(tmp_path / "one.png", video[:1], 16)
    assert single == tmp_path / "one.png"
    assert np.array_equal(np.asarray(Image.open(single)), video[0])


def test_pngs_replace_an_earlier_run_and_nothing_else(tmp_path, clip, files_in):
    write_video(tmp_path / "v.png", clip(9), 16)
    video = clip(5)
    folder = write_video(tmp_path / "v.png", video, 16)
    assert files_in(tmp_path) == ["v", *(f"v/{i:05d}.png" for i in range(5))]
    assert np.array_equal(np.asarray(Image.open(folder / "00004.png")), video[4])
    (folder / "notes.txt").write_text("mine")
    before = files_in(tmp_path)
    for refuse in (
        lambda: write_video(tmp_path / "v.png", video, 16),
        lambda: check_target(tmp_path / "v.png", num_frames=5),  # known before a generation starts
    ):
        with pytest.raises(MediaError, match="holds other things"):
            refuse()
        assert files_in(tmp_path) == before
    check_target(tmp_path / "v.png", num_frames=1)  # v.png itself is free


# What cannot be written


def test_folders_are_made_and_files_replaced(tmp_path, clip, decode, files_in):
    path = tmp_path / "a" / "b" / "v.mp4"
    write_video(path, clip(9), 16)
    write_video(path, clip(5), 16)
    assert len(decode(path)[0]) == 5
    assert files_in(tmp_path) == ["a", "a/b", "a/b/v.mp4"]


@pytest.mark.parametrize("name", ["v.avi", "v", "v.mp4.bak", ""])
def test_unknown_suffixes(tmp_path, name):
    with pytest.raises(MediaError, match=r"\.mp4, \.webm, \.gif, \.png"):
        check_target(tmp_path / name)


@pytest.mark.parametrize("folder", ["/dev/null/x", "/proc", "/proc/none", "FILE", "FILE/x"])
@pytest.mark.parametrize("name", ["v.mp4", "v.webm", "v.gif", "v.png"])
def test_places_that_cannot_be_written(tmp_path, folder, name, clip, files_in):
    if folder.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("needs /proc")
    (tmp_path / "file").write_text("kept")
    target = Path(folder.replace("FILE", str(tmp_path / "file"))) / name
    for refuse in (lambda: check_target(target), lambda: write_video(target, clip(3), 16)):
        with pytest.raises(MediaError) as caught:
            refuse()
        assert str(target.parent) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert files_in(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_in_the_files_place(tmp_path):
    (tmp_path / "v.mp4").mkdir()
    with pytest.raises(MediaError, match="is a folder"):
        check_target(tmp_path / "v.mp4")


def test_a_name_too_long_for_the_disk(tmp_path, files_in):
    with pytest.raises(MediaError, match=r"cannot be written \(File name too long\)"):
        check_target(tmp_path / f"{'v' * 300}.mp4")
    assert files_in(tmp_path) == []


class Stops(np.ndarray):
    """Frames whose third cannot be had: the user pressed Ctrl-C, or memory ran out."""

    raises: BaseException

    def __iter__(self):  # type: ignore[no-untyped-def]
        for i, frame in enumerate(self.view(np.ndarray)):
            if i == 2:
                raise self.raises
            yield frame


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".png"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, suffix, error, clip, files_in):
    path = tmp_path / f"v{suffix}"
    earlier = write_video(path, clip(3), 16)
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path) if (tmp_path / name).is_file()}
    frames = clip(5).view(Stops)
    frames.raises = error
    with pytest.raises(MediaError if isinstance(error, OSError) else type(error)) as caught:
        write_video(path, frames, 16)
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {path}: No space left on device"
    after = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path) if (tmp_path / name).is_file()}
    assert after == before
    assert earlier.exists()


# Frames that are still on their way


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".png"])
def test_portions_make_the_same_file(tmp_path, suffix, clip, decode):
    video = clip(13)
    whole = write_video(tmp_path / f"whole{suffix}", video, 16)
    with VideoWriter(tmp_path / f"portions{suffix}", 13, 16) as writer:
        for start, stop in ((0, 1), (1, 5), (5, 9), (9, 13)):
            writer.add(video[start:stop])
    portions = whole.with_name(whole.name.replace("whole", "portions"))
    if whole.is_dir():
        pairs = [(path, portions / path.name) for path in whole.iterdir()]
        assert len(pairs) == 13
    else:
        pairs = [(whole, portions)]
    if suffix == ".webm":  # which holds a random number
        assert np.array_equal(decode(whole)[0], decode(portions)[0])
        return
    assert all(a.read_bytes() == b.read_bytes() for a, b in pairs)


def test_frames_are_written_while_others_are_missing(tmp_path, clip, files_in):
    video = clip(5)
    with VideoWriter(tmp_path / "v.png", 5, 16) as writer:
        writer.add(video[:3])
        deadline = time.monotonic() + 20
        while sum(name.endswith("/00002.png") for name in files_in(tmp_path)) == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not (tmp_path / "v").exists()
        writer.add(video[3:])
    assert files_in(tmp_path / "v") == [f"{i:05d}.png" for i in range(5)]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".png"])
@pytest.mark.parametrize("added", [0, 1, 6])
def test_an_error_between_portions_leaves_the_old_file_and_no_thread(tmp_path, suffix, added, clip, files_in):
    earlier = write_video(tmp_path / f"v{suffix}", clip(3), 16)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files_in(tmp_path)}

    def interrupted() -> None:
        with VideoWriter(tmp_path / f"v{suffix}", 9, 16) as writer:
            writer.add(clip(added))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files_in(tmp_path)} == before
    assert earlier.exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("writes")]


def test_a_video_is_never_short_nor_long(tmp_path, clip, files_in):
    def write(*counts: int) -> None:
        with VideoWriter(tmp_path / "v.mp4", 5, 16) as writer:
            for count in counts:
                writer.add(clip(count))

    with pytest.raises(ValueError, match="2 of 5 frames are missing"):
        write(3)
    with pytest.raises(ValueError, match="2 of 5 are missing"):
        write(3, 3)
    assert files_in(tmp_path) == []


# Disks that are full, processes that are killed

_ENDLESS = """
import resource, sys, threading, time
from pathlib import Path
import numpy as np
from turbowan.errors import MediaError
from turbowan.media.video import VideoWriter
path, limit = Path(sys.argv[1]), int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
frames = np.random.default_rng(0).integers(0, 256, (4, 64, 96, 3), dtype=np.uint8)
try:
    with VideoWriter(path, 10**9, 16) as writer:
        while True:
            writer.add(frames)
            time.sleep(0.005)
except MediaError as error:
    assert threading.active_count() == 1
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".png"])
def test_a_file_that_may_not_grow_ends_the_work_with_one_line(tmp_path, suffix, files_in):
    """The thread fails while frames are added without an end: `add` says so instead of waiting for ever."""
    limit = 8_000 if suffix == ".png" else 100_000
    path = tmp_path / f"v{suffix}"
    done = subprocess.run(
        [sys.executable, "-c", _ENDLESS, str(path), str(limit)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == f"cannot write {path}: File too large\n", done.stderr
    assert files_in(tmp_path) == []


@pytest.fixture
def tiny_disk(tmp_path):
    """A disk of 32 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".png"])
def test_a_full_disk_is_one_line_and_leaves_no_file(tiny_disk, suffix, files_in):
    frames = np.random.default_rng().integers(0, 256, (9, 64, 96, 3), dtype=np.uint8)
    path = tiny_disk / f"v{suffix}"
    with pytest.raises(MediaError) as caught:
        write_video(path, frames, 16)
    assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert files_in(tiny_disk) == []
    write_video(path, frames[:1] // 128 * 128, 16)  # what fits, fits


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("suffix", [".mp4", ".png"])
def test_what_a_killed_process_leaves_goes_at_the_next_run(tmp_path, suffix, clip, files_in):
    path = tmp_path / f"v{suffix}"
    work = subprocess.Popen([sys.executable, "-c", _ENDLESS, str(path), "0"])
    deadline = time.monotonic() + 60
    while not files_in(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    others = tmp_path / f".v.{os.getppid()}.part{suffix}"
    others.write_bytes(b"of a process that runs")
    write_video(path, clip(1), 16)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, f".v.{work.pid}.part{suffix}", others.name}
    work.send_signal(signal.SIGKILL)
    work.wait()
    assert any(name.startswith(f".v.{work.pid}.part") for name in files_in(tmp_path))
    write_video(path, clip(1), 16)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, others.name}
