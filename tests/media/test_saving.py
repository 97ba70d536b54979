"""From generations to files: their names, what is written in them, and that frames may still be on their way."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from turbowan.errors import MediaError
from turbowan.media.saving import VideoFiles, save_side_by_side, save_videos

CLOSE = 25.0  # dB, as in test_video
PROMPT = 'a "red" cat, 一只红猫 🐈, at 5 o\'clock'


@dataclass
class Result:
    """What a generation gives, as far as writing looks at it."""

    videos: list[np.ndarray]
    fps: int = 16
    settings: dict[str, object] = field(default_factory=lambda: {"prompt": PROMPT, "seed": 7, "shift": 8.0})
    stages: dict[str, float] = field(default_factory=lambda: {"write": 0.0, "total": 1.0})


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
def test_prompt_and_settings_are_in_the_file(tmp_path, suffix, frames, clip):
    result = Result([clip(frames)])
    (written,) = save_videos(result, tmp_path / f"v{suffix}")
    if written.is_dir():
        written = written / "00002.png"
    kept = comment(written)
    assert kept["prompt"] == PROMPT
    assert json.loads(kept["settings"]) == result.settings
    assert result.stages["write"] > 0
    assert result.stages["total"] == pytest.approx(1 + result.stages["write"])


def test_a_long_prompt_is_kept_whole(tmp_path, clip):
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


def test_samples_are_numbered(tmp_path, clip, decode, psnr):
    videos = [clip(5), clip(5)[:, :, ::-1].copy(), 255 - clip(5)]
    paths = save_videos(Result(videos), tmp_path / "v.mp4")
    assert [p.name for p in paths] == ["v-0.mp4", "v-1.mp4", "v-2.mp4"]
    for path, video in zip(paths, videos, strict=True):
        assert psnr(decode(path)[0], video) > CLOSE
    assert [p.name for p in save_videos(Result(videos), tmp_path / "w.png")] == ["w-0", "w-1", "w-2"]


def test_side_by_side_is_one_wide_video(tmp_path, clip, decode, psnr):
    videos = [clip(5), 255 - clip(5)]
    path = save_side_by_side(Result(videos), tmp_path / "both", crf=10)
    assert path.name == "both.mp4"
    assert psnr(decode(path)[0], np.concatenate(videos, axis=2)) > CLOSE
    still = save_side_by_side(Result([v[:1] for v in videos]), tmp_path / "still.mp4", crf=10)
    with Image.open(still) as image:
        assert image.format == "JPEG"
        assert image.size == (2 * 96, 64)




# While the generation goes on


def test_samples_are_written_side_by_side_as_they_come(tmp_path, clip, decode, psnr, files_in):
    videos = [clip(9), 255 - clip(9)]
    result = Result(videos)
    with VideoFiles(tmp_path / "v.mp4") as files:
        files.begin(2, 9, 16, result.settings)
        for start, stop in ((0, 1), (1, 5), (5, 9)):
            for i, video in enumerate(videos):
                files.add(i, video[start:stop])
        paths = files.close(result)
    assert [p.name for p in paths] == files_in(tmp_path) == ["v-0.mp4", "v-1.mp4"]
    for path, video in zip(paths, videos, strict=True):
        assert psnr(decode(path)[0], video) > CLOSE
        assert json.loads(comment(path)["settings"]) == result.settings
    assert result.stages["write"] > 0
    assert result.stages["total"] == pytest.approx(1 + result.stages["write"])


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".png"])
def test_an_error_before_the_end_leaves_no_file_at_all(tmp_path, suffix, clip, files_in):
    def fail() -> None:
        with VideoFiles(tmp_path / f"v{suffix}") as files:
            files.begin(3, 5, 16, {})
            files.add(0, clip(5))  # whole, but not the others
            files.add(1, clip(3))
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert files_in(tmp_path) == []


def test_one_that_cannot_be_encoded_takes_the_others_with_it(tmp_path, clip, files_in):
    videos = [clip(5), clip(5, 63, 95)]  # odd sizes do not go into mp4
    result = Result(videos)

    def write() -> None:
        with VideoFiles(tmp_path / "v.mp4") as files:
            files.begin(2, 5, 16, {})
            for i, video in enumerate(videos):
                files.add(i, video)
            files.close(result)

    with pytest.raises(MediaError, match="95x63"):
        write()
    assert files_in(tmp_path) == []


def test_what_is_in_the_way_is_found_before_the_work(tmp_path, clip):
    (tmp_path / "v-1.mp4").mkdir()
    with pytest.raises(MediaError, match=r"v-1\.mp4 is a folder"), VideoFiles(tmp_path / "v.mp4") as files:
        files.begin(2, 5, 16, {})
