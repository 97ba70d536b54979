"""`turbowan generate` as its users call it: another process, its output, its exit code, and what it leaves behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import av
import pytest
from PIL import Image
from typer.testing import CliRunner

from turbowan.cli.main import app
from turbowan.errors import MediaError, RequestError

SMALL = ["--width", "64", "--height", "48", "--num-frames", "5", "--num-steps", "2"]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "turbowan", "generate", *map(str, arguments)]


def turbowan(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False)


def test_from_a_prompt_to_a_file_and_one_line_of_json(tmp_path):
    target = tmp_path / "made" / "a b.mp4"
    done = turbowan("--prompt", "a red circle moves right", "-o", target, "--json", "--seed", "5", *SMALL)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["files"] == [str(target)]
    assert (result["frames"], result["height"], result["width"], result["seed"]) == (5, 48, 64, 5)
    assert set(result["stages"]) == {"text", "condition", "load", "denoise", "switch", "decode", "write", "total"}
    assert min(result["stages"].values()) >= 0  # so short a video can be written as soon as it is decoded
    assert min(result["stages"][name] for name in ("text", "denoise", "decode", "total")) > 0
    assert done.stderr == ""  # progress is for terminals
    with av.open(str(target)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5
        assert "a red circle moves right" in container.metadata["title"]


def test_a_file_of_prompts_makes_a_video_of_each_line(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n  ein blaues Quadrat – 蓝色的方块\n", encoding="utf-8")
    done = turbowan("--prompt-file", prompts, "-o", tmp_path / "v.gif", "--num-samples", "2", *SMALL)
    assert done.returncode == 0, done.stderr
    names = ["v-000-0.gif", "v-000-1.gif", "v-001-0.gif", "v-001-1.gif"]
    assert done.stdout.split() == [str(tmp_path / name) for name in names]
    assert sorted(p.name for p in tmp_path.glob("*.gif")) == names


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--num-frames", "80"], "num_frames must be 4k+1, got 80 (nearest: 77 or 81)"),
        (["--num-frames", "0"], "num_frames must be 4k+1, got 0 (nearest: 1 or 5)"),
        (["--width", "17", "--height", "31"], "width must be a multiple of 16 from 16 to 4096 pixels, got 17"),
        (["--model", "huge"], "there is no model 'huge'"),
        (["--vae", "none.pth"], "vae file none.pth does not exist"),
        (["--image", "none.png"], "none.png"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x" * 10_000], "prompt has 10,000 characters; at most 5,000 are taken"),
        (["--prompt-file", "p.txt"], "give one of --prompt and --prompt-file"),
        (["-o", "video.avi"], "ends in '.avi'"),
        (["-o", "/dev/null/video.mp4"], "/dev/null"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_no_file(arguments, line, tmp_path):
    given = ["--prompt", "a red circle", "-o", str(tmp_path / "v.mp4"), *arguments]
    done = turbowan(*given)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert line in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_prompt_files_that_hold_none(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "picture.txt").write_bytes(bytes(range(128, 256)))
    wrong = {"empty.txt": "has no prompts", "picture.txt": "cannot be read as text", "no.txt": "no.txt"}
    for name, error in wrong.items():
        files = ["--prompt-file", str(tmp_path / name), "-o", str(tmp_path / "v.mp4")]
        outcome = CliRunner().invoke(app, ["generate", *files])
        assert isinstance(outcome.exception, RequestError)
        assert error in str(outcome.exception)


def test_the_place_is_tried_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "v.mp4"
    outcome = CliRunner().invoke(app, ["generate", "--model", "huge", "--prompt", "a cat", "-o", str(target)])
    assert isinstance(outcome.exception, MediaError)


def test_ctrl_c_stops_between_steps_and_leaves_nothing(tmp_path):
    arguments = ["--prompt", "a red circle", "--model", "tiny-base", *SMALL, "--num-steps", "900"]
    ours, terminal = pty.openpty()  # on a terminal progress is shown, so that we see the first steps
    work = subprocess.Popen(command(*arguments, "-o", tmp_path / "v.mp4"), stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    shown = b""
    while b"denoise   1/" not in shown:
        shown += os.read(ours, 1000)
    work.send_signal(signal.SIGINT)
    with suppress(OSError):  # the terminal's end
        while more := os.read(ours, 1000):
            shown += more
    assert work.wait(timeout=60) == 130
    assert work.stdout.read() == b""
    assert shown.decode().strip().splitlines()[-1] == "turbowan: stopped"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_decoding_leaves_nothing(tmp_path):
    """The encoder's thread has begun its file by then."""
    arguments = ["-p", "a red circle", "--width", "128", "--height", "96", "--num-frames", "81", "--num-steps", "1"]
    ours, terminal = pty.openpty()
    work = subprocess.Popen(command(*arguments, "-o", tmp_path / "v.mp4"), stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    shown = b""
    while b"decode    2/" not in shown:
        shown += os.read(ours, 1000)
    work.send_signal(signal.SIGINT)
    with suppress(OSError):
        while more := os.read(ours, 1000):
            shown += more
    assert work.wait(timeout=60) == 130
    assert work.stdout.read() == b""
    assert shown.decode().strip().splitlines()[-1] == "turbowan: stopped"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".png"])
def test_a_disk_without_room_is_one_line_exit_code_2_and_no_file(suffix, tmp_path):
    """As the kernel says it of a file that may not grow beyond a kilobyte; the GPU's work ends, too."""
    resource = pytest.importorskip("resource")
    target = tmp_path / f"v{suffix}"
    arguments = ["--prompt", "a red circle", "--num-samples", "2", "-o", target, *SMALL]
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    either = [f"turbowan: cannot write {tmp_path / name}{suffix}: File too large\n" for name in ("v-0", "v-1")]
    assert done.stderr in either  # both are written at once
    assert list(tmp_path.iterdir()) == []


def test_a_preview_lies_beside_the_video(tmp_path):
    done = turbowan("--prompt", "a red circle", "--preview", "-o", tmp_path / "v.mp4", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "v.mp4")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.mp4", "v.preview.gif"]
    with Image.open(tmp_path / "v.preview.gif") as gif:
        assert (gif.size, gif.n_frames) == ((16, 12), 2)
