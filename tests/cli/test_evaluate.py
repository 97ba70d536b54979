"""`turbowan evaluate tiny`, whole: the embedded weights at a small size of their own, to report and sheet."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from turbowan.checkpoints.manifest import read_manifest, write_manifest
from turbowan.engine import EMBEDDED


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A model folder with the embedded weights, whose default is 9 frames of 96x64."""
    folder = tmp_path / "small"
    folder.mkdir()
    manifest = read_manifest(EMBEDDED / "tiny")
    for path in manifest.files.values():
        (folder / path.name).symlink_to(path)
    files = {role: folder / path.name for role, path in manifest.files.items()}
    write_manifest(replace(manifest, files=files, width=96, height=64, num_frames=9), folder)
    return folder


def test_it_writes_report_and_sheet(
    tmp_path: Path, small: Path, command_line: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "new" / "folder"
    code, printed, _ = command_line(
        "evaluate", "tiny", "--model", small, "--prompts", 3, "--batch", 2, "--camera-prompts", 1, "--clips", 2,
        "--num-steps", 2, "--guidance-scale", 2, "--device", "cpu", "-o", out,
    )  # fmt: skip
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    assert json.loads(printed) == report
    assert (report["steps"], report["guidance_scale"], report["sampler"]) == (2, 2.0, "unipc")
    assert {"model", "device", "torch", "shift"} <= set(report)
    assert set(report["prompts"]["right"]) == {"colour", "shape", "direction", "background", "all"}
    for found in report["prompts"]["right"].values():
        assert 0 <= found["low"] <= found["share"] <= found["high"] <= 1
        assert found["total"] == 3
    assert report["camera"]["prompts"] == 1
    assert set(report["camera"]["right"]) == {"direction", "all"}
    assert report["vae"]["clips"] == 2
    assert len(report["vae"]["psnr_by_frame"]) == 9
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > sheet.height > 50
    assert sorted(p.name for p in out.iterdir()) == ["camera.png", "report.json", "sheet.png"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--prompts", -1), "an evaluation takes at least 1 prompt, 1 at a time; got -1, 4 at a time"),
        (("--model", "nowhere"), "there is no model 'nowhere'"),
        (("--sampler", "ddim"), "sampler must be one of rcm, euler, unipc, got 'ddim'"),
        (("--device", "cuda:77"), "device 'cuda:77' is not there"),
        (("-o", "/dev/null/x"), "/dev/null/x"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], line: str, command_line: Callable[..., tuple[int, str, str]]
) -> None:
    code, printed, error = command_line("evaluate", "tiny", "--device", "cpu", *arguments)
    assert code == 2
    assert printed == ""
    assert error.startswith("turbowan: ")
    assert line in error
    assert error.count("\n") == 1
