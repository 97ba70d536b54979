"""From IMAGE to a file's pixels and name, without ComfyUI."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
import torch

from turbowan.comfy.save_video import TurboDiffusionSaveVideo, crf_of, safe_prefix, to_pixels
from turbowan.errors import MediaError

pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.mark.parametrize("prefix", ["", " ", "..", "../x", "a/../../x", "a\\..\\..\\x", "/tmp/x", "\\x", "C:\\x", "./"])
def test_a_prefix_stays_inside_the_folder(prefix: str) -> None:
    with pytest.raises(MediaError, match="filename_prefix"):
        safe_prefix(prefix)


@pytest.mark.parametrize(
    ("prefix", "safe"), [("a", "a"), ("a\\b", "a/b"), ("a//b.c", "a/b.c"), (" %date:yyyy% ", "%date:yyyy%")]
)
def test_a_prefix_may_have_folders_of_either_system(prefix: str, safe: str) -> None:
    assert safe_prefix(prefix) == safe


def test_values_outside_are_clipped_and_alpha_is_dropped() -> None:
    frames = torch.rand(3, 5, 7, 4)
    frames[0, 0, 0, 0], frames[1, 1, 1, 1], frames[2, 2, 2, 2] = 1.7, -0.4, float("nan")
    pixels = to_pixels(frames, even=False)
    assert pixels.shape == (3, 5, 7, 3)
    assert (pixels[0, 0, 0, 0], pixels[1, 1, 1, 1], pixels[2, 2, 2, 2]) == (255, 0, 0)
    assert np.abs(pixels[0, 1:].astype(float) - 255 * frames[0, 1:, :, :3].numpy()).max() <= 0.51


def test_odd_sizes_repeat_their_last_row_and_column() -> None:
    pixels = to_pixels(torch.rand(2, 5, 7, 3), even=True)
    assert pixels.shape == (2, 6, 8, 3)
    assert (pixels[:, 5] == pixels[:, 4]).all()
    assert (pixels[:, :, 7] == pixels[:, :, 6]).all()


@pytest.mark.parametrize("frames", [None, torch.rand(5, 7, 3), torch.rand(0, 5, 7, 3), torch.rand(2, 5, 7, 2)])
def test_what_is_no_video_is_refused_by_name(frames: object) -> None:
    with pytest.raises(MediaError, match="frames"):
        to_pixels(frames, even=True)


@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_a_higher_quality_is_a_lower_crf(format: str) -> None:
    rates = [crf_of(format, quality) for quality in range(1, 11)]
    assert rates == sorted(set(rates), reverse=True)


@pytest.mark.parametrize("format", ["mp4", "webm", "gif"])
def test_two_saves_in_a_row_are_two_files_where_the_page_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """The naming functions of ComfyUI that the node calls, as they are documented: it counts other files than ours."""
    paths = ModuleType("folder_paths")
    paths.get_output_directory = lambda: str(tmp_path)  # type: ignore[attr-defined]

    def place(prefix: str, folder: str, width: int, height: int) -> tuple:
        sub, name = str(Path(prefix).parent), Path(prefix).name
        return str(Path(folder) / sub), name, 1, sub, name

    paths.get_save_image_path = place  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    frames = torch.rand(4, 17, 33, 3)
    shown = [
        TurboDiffusionSaveVideo().save_video(frames, "clip", 8, format, loop=False)["ui"]["images"][0] for _ in range(2)
    ]
    files = [tmp_path / entry["subfolder"] / entry["filename"] for entry in shown]
    assert files[0] != files[1]
    for file in files:
        with av.open(str(file)) as container:
            assert len(list(container.decode(video=0))) == 4
