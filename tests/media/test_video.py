"""Every format is written and decoded again; what cannot be written says so and leaves nothing behind."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from turbowan.errors import MediaError
from turbowan.media.saving import save_side_by_side, save_videos
from turbowan.media.video import check_target, write_video
from turbowan.world.scenes import MOTIONS, draw_scenes, render

SEED = random.randrange(2**31)
CLOSE = 25.0  # dB; most of what is lost is the sharpness of colours in 4:2:0, over clips of 96x64
PROMPT = 'a "red" cat, 一只红猫 🐈, at 5 o\'clock'


def clip(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A clip of the procedural world in which something moves, uint8 [T, H, W, 3]."""
    print(f"seed {SEED}")
    scenes = draw_scenes(20, torch.Generator().manual_seed(SEED), held_out=None)
    moving = scenes.motion < MOTIONS.index("turn")  # away from where it starts
    video = render(scenes[moving][:1], frames, height, width)[0]
    return ((video + 1) * 127.5 + 0.5).byte().permute(1, 2, 3, 0).contiguous().numpy()


def decode(path: Path) -> tuple[np.ndarray, Fraction]:
    """All frames of a container, and its frames per second."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate is not None
        return np.stack(frames), stream.average_rate


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@dataclass
class Result:
    """What a generation gives, as far as writing looks at it."""

    videos: list[np.ndarray]
    fps: int = 16
    settings: dict[str, object] = field(default_factory=lambda: {"prompt": PROMPT, "seed": 7, "shift": 8.0})
    stages: dict[str, float] = field(default_factory=lambda: {"write": 0.0, "total": 1.0})


# Containers


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "h264"), (".webm", "vp9")])
@pytest.mark.parametrize(("frames", "fps"), [(1, 16), (2, 24), (7, 12), (33, 16)])
def test_a_container_gives_its_frames_back(tmp_path: Path, suffix: str, codec: str, frames: int, fps: int) -> None:
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
def test_colours_are_tagged_and_right(tmp_path: Path, suffix: str) -> None:
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
def test_a_gif_plays_again_or_once(tmp_path: Path, loop: bool, times: int | None) -> None:
    with Image.open(write_video(tmp_path / "g.gif", clip(5), 10, loop=loop, optimize=True)) as picture:
        assert picture.info.get("loop") == times
        assert picture.n_frames == 5


def test_quality_follows_crf(tmp_path: Path) -> None:
    video = clip(9)[..., :1].repeat(3, axis=3)  # grey loses nothing to 4:2:0
    sizes = [write_video(tmp_path / f"{crf}.mp4", video, 16, crf=crf).stat().st_size for crf in (5, 18, 40)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert psnr(decode(tmp_path / "5.mp4")[0], video) > psnr(decode(tmp_path / "40.mp4")[0], video) + 3


def test_mp4_plays_while_it_loads(tmp_path: Path) -> None:
    data = write_video(tmp_path / "v.mp4", clip(9), 16).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_containers_need_even_sizes(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(MediaError, match="31x17"):
        write_video(tmp_path / f"v{suffix}", np.zeros((2, 17, 31, 3), np.uint8), 16)
    assert files_in(tmp_path) == []


# Pictures


@pytest.mark.parametrize(("frames", "fps"), [(1, 16), (6, 16), (33, 16), (25, 24), (10, 30)])
def test_a_gif_keeps_frames_and_length(tmp_path: Path, frames: int, fps: int) -> None:
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


def test_pngs_are_exact(tmp_path: Path) -> None:
    video = clip(5, 17, 31)  # any size
    folder = write_video(tmp_path / "new" / "v.png", video, 16)
    assert folder == tmp_path / "new" / "v"
    assert files_in(folder) == [f"{i:05d}.png" for i in range(5)]
    seen = np.stack([np.asarray(Image.open(folder / f"{i:05d}.png")) for i in range(5)])
    assert np.array_equal(seen, video)
    single = write_video(tmp_path / "one.png", video[:1], 16)
    assert single == tmp_path / "one.png"
    assert np.array_equal(np.asarray(Image.open(single)), video[0])


def test_pngs_replace_an_earlier_run_and_nothing_else(tmp_path: Path) -> None:
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


# What the container says


def comment(path: Path) -> dict[str, str]:
    if path.suffix == ".gif":
        with Image.open(path) as gif:
            return json.loads(gif.info["comment"])
    if path.suffix == ".png":
        with Image.open(path) as png:
            return dict(png.text)  # type: ignore[attr-defined]
    with av.open(str(path)) as container:
        found = {key.lower(): value for key, value in container.metadata.items()}
    assert found["title"] == PROMPT
    return json.loads(found["comment"])


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".png"])
@pytest.mark.parametrize("frames", [1, 3])
def test_prompt_and_settings_are_in_the_file(tmp_path: Path, suffix: str, frames: int) -> None:
    result = Result([clip(frames)])
    (written,) = save_videos(result, tmp_path / f"v{suffix}")
    if written.is_dir():
        written = written / "00002.png"
    kept = comment(written)
    assert kept["prompt"] == PROMPT
    assert json.loads(kept["settings"]) == result.settings
    assert result.stages["write"] > 0
    assert result.stages["total"] == pytest.approx(1 + result.stages["write"])


def test_a_long_prompt_is_kept_whole(tmp_path: Path) -> None:
    result = Result([clip(3)], settings={"prompt": "很长 prompt " * 500})
    for suffix in (".mp4", ".webm", ".gif"):
        (path,) = save_videos(result, tmp_path / f"v{suffix}")
        if suffix == ".gif":
            assert comment(path)["prompt"] == result.settings["prompt"]
        else:
            with av.open(str(path)) as container:
                found = {key.lower(): value for key, value in container.metadata.items()}
            assert json.loads(found["comment"])["prompt"] == result.settings["prompt"]


# Several samples


def test_samples_are_numbered(tmp_path: Path) -> None:
    videos = [clip(5), clip(5)[:, :, ::-1].copy(), 255 - clip(5)]
    paths = save_videos(Result(videos), tmp_path / "v.mp4")
    assert [p.name for p in paths] == ["v-0.mp4", "v-1.mp4", "v-2.mp4"]
    for path, video in zip(paths, videos, strict=True):
        assert psnr(decode(path)[0], video) > CLOSE
    assert [p.name for p in save_videos(Result(videos), tmp_path / "w.png")] == ["w-0", "w-1", "w-2"]


def test_side_by_side_is_one_wide_video(tmp_path: Path) -> None:
    videos = [clip(5), 255 - clip(5)]
    path = save_side_by_side(Result(videos), tmp_path / "both", crf=10)
    assert path.name == "both.mp4"
    assert psnr(decode(path)[0], np.concatenate(videos, axis=2)) > CLOSE
    still = save_side_by_side(Result([v[:1] for v in videos]), tmp_path / "still.mp4", crf=10)
    with Image.open(still) as image:
        assert image.format == "JPEG"
        assert image.size == (2 * 96, 64)


# What cannot be written


def test_folders_are_made_and_files_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "v.mp4"
    write_video(path, clip(9), 16)
    write_video(path, clip(5), 16)
    assert len(decode(path)[0]) == 5
    assert files_in(tmp_path) == ["a", "a/b", "a/b/v.mp4"]


@pytest.mark.parametrize("name", ["v.avi", "v", "v.mp4.bak", ""])
def test_unknown_suffixes(tmp_path: Path, name: str) -> None:
    with pytest.raises(MediaError, match=r"\.mp4, \.webm, \.gif, \.png"):
        check_target(tmp_path / name)


@pytest.mark.parametrize("folder", ["/dev/null/x", "/proc", "/proc/none", "FILE", "FILE/x"])
@pytest.mark.parametrize("name", ["v.mp4", "v.webm", "v.gif", "v.png"])
def test_places_that_cannot_be_written(tmp_path: Path, folder: str, name: str) -> None:
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


def test_a_folder_in_the_files_place(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").mkdir()
    with pytest.raises(MediaError, match="is a folder"):
        check_target(tmp_path / "v.mp4")


def test_a_name_too_long_for_the_disk(tmp_path: Path) -> None:
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
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, suffix: str, error: BaseException) -> None:
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
