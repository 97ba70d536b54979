"""`turbowan evaluate` as its users call it: small models for real, to table, report and sheets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CommandLine = Callable[..., tuple[int, str, str]]


def test_prompts_in_two_shards_and_joined(tmp_path: Path, small_t2v: Path, command_line: CommandLine) -> None:
    reference, case = str(small_t2v), f"{small_t2v}:steps=1,sampler=euler"
    cases = ("--case", case, "--against", reference)
    common = ("--prompts", 3, "--diversity", 2, "--errors", 1, "--device", "cpu")
    for shard in (1, 2):
        out = tmp_path / "new" / str(shard)
        extra = ("--camera-prompts", 1) if shard == 2 else ()
        code, printed, error = command_line(
            "evaluate", "prompts", *cases, *common, *extra, "--shard", f"{shard}/2", "--batch", shard, "-o", out
        )
        assert code == 0, error
        assert "turbowan: note: small-t2v is not distilled: 2 steps are too few" in error
    assert sorted(path.name for path in out.iterdir()) == ["camera.png", "report.json", "shapes.png"]
    lines = printed.splitlines()
    assert lines[0] == "shapes: 2 prompts"
    assert [line.split()[0] for line in lines[2:5]] == ["world", reference, case]
    assert lines[5] == "camera: 1 prompts"
    with Image.open(out / "shapes.png") as sheet:
        assert sheet.width > sheet.height > 50

    target = tmp_path / "all.json"
    parts = [tmp_path / "new" / str(shard) / "report.json" for shard in (1, 2)]
    code, printed, _ = command_line("evaluate", "join", *parts, "-o", target, "--json")
    assert code == 0
    summary = json.loads(printed)
    joined = json.loads(target.read_text())
    assert summary == {what: part["summary"] for what, part in joined["parts"].items()}
    assert joined["parts"]["shapes"]["rows"] == [0, 1, 2]
    assert summary["shapes"][case]["right"]["all"]["total"] == 3
    assert summary["shapes"][case]["against"]["right"]["all"]["total"] == 3
    assert summary["shapes"][case]["diversity"]["total"] == 2
    assert summary["shapes"][case]["error"]["total"] == 1
    assert [facts["command"].split()[:3] for facts in joined["joined"]] == [["turbowan", "evaluate", "prompts"]] * 2
    assert {"gpu", "torch", "commit"} <= set(joined["joined"][0])


def test_i2v_over_pictures_shapes_and_photos(tmp_path: Path, small_i2v: Path, command_line: CommandLine) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(photos / "noise.png")
    code, printed, error = command_line(
        "evaluate", "i2v", "--case", small_i2v, "--against", "world", "--pictures", 1, "--shapes", 1,
        "--photos", photos, "--diversity", 1, "--errors", 1, "--device", "cpu", "-o", out, "--json",
    )  # fmt: skip
    assert code == 0, error
    summary = json.loads(printed)
    report = json.loads((out / "report.json").read_text())
    assert list(summary) == ["pictures", "shapes", "photos"]
    assert summary["photos"][str(small_i2v)]["right"]["direction"]["total"] == 6
    assert "world" not in summary["photos"]  # nobody knows what a photograph does under a moving camera
    assert "against" in summary["pictures"][str(small_i2v)]
    for part in report["parts"].values():
        values = part["cases"][str(small_i2v)]["values"]
        assert all(vae > ours for vae, ours in zip(values["vae_psnr"], values["psnr"], strict=True))
        assert values["diversity"][0] > 0
        assert values["error"][0] > 0
    assert sorted(path.name for path in out.iterdir()) == ["photos.png", "pictures.png", "report.json", "shapes.png"]


def test_the_vae_alone(small_t2v: Path, command_line: CommandLine) -> None:
    code, printed, _ = command_line("evaluate", "vae", "--model", small_t2v, "--clips", 2, "--device", "cpu")
    assert code == 0
    report = json.loads(printed)
    assert report["model"] == "small-t2v"
    assert report["shapes"]["clips"] == report["camera"]["clips"] == 2
    assert len(report["shapes"]["psnr_by_frame"]) == 5


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("prompts", "--prompts", -1), "an evaluation takes at least 1 prompt, got -1"),
        (("prompts", "--case", "nowhere"), "there is no model 'nowhere'"),
        (("prompts", "--case", "tiny:sampler=ddim"), "sampler must be one of rcm, euler, unipc, got 'ddim'"),
        (("prompts", "--case", "tiny", "--case", "tiny"), "case 'tiny' is given twice"),
        (("prompts", "--device", "cuda:77"), "device 'cuda:77' is not there"),
        (("prompts", "--batch", 0), "a batch of at least 1"),
        (("prompts", "--shard", "3/2"), "a shard i/n is from 1/n to n/n, got 3/2"),
        (("prompts", "--shard", "half"), "--shard takes i/n, such as 1/4; got 'half'"),
        (("prompts", "-o", "/dev/null/x"), "/dev/null/x"),
        (("i2v", "--pictures", 0, "--shapes", 0), "nothing is asked"),
        (("i2v", "--photos", "/nowhere"), "/nowhere is no folder with pictures"),
        (("join", "/nowhere.json"), "/nowhere.json is not a readable report"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[object, ...], line: str, command_line: CommandLine) -> None:
    code, printed, error = command_line("evaluate", *arguments)
    assert code == 2
    assert printed == ""
    assert error.startswith("turbowan: ")
    assert line in error
    assert error.count("\n") == 1
