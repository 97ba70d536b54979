"""`turbowan doctor`: true answers, in particular the very implementations that the registry dispatches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from turbowan import machine
from turbowan.cli.doctor import examine
from turbowan.cli.main import main
from turbowan.engine import Engine
from turbowan.media import video
from turbowan.ops import OPERATIONS, force
from turbowan.ops.registry import Constraints, Implementation
from turbowan.ops.rows import FORMATS
from turbowan.request import GenerateRequest

PACKAGE = Path(machine.__file__).parent


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in this process: exit code and standard output."""

    def run(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["turbowan", "doctor", *args])
        with pytest.raises(SystemExit) as exited:
            main()
        return int(exited.value.code or 0), capsys.readouterr().out

    return run


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Operation -> names of the implementations that ran, filled as they do."""
    seen: dict[str, set[str]] = defaultdict(set)

    def watched(operation: str, implementation: Implementation) -> Implementation:
        def function(*args: Any, **kwargs: Any) -> Any:
            seen[operation].add(implementation.name)
            return implementation.function(*args, **kwargs)

        return replace(implementation, function=function)

    for name, operation in OPERATIONS.items():
        implementations = [watched(name, i) for i in operation.implementations]
        monkeypatch.setattr(operation, "implementations", implementations)
        monkeypatch.setattr(operation, "eager", implementations[0].function)
        monkeypatch.setattr(operation, "_chosen", {})
    return seen


def answers() -> dict[str, str]:
    return {name: places["cpu float32"]["uses"] for name, places in examine()["operations"].items()}


def test_its_answers_are_what_a_generation_runs(ran) -> None:
    request = GenerateRequest(prompt="a red circle", width=64, height=64, num_frames=5, num_steps=1)
    Engine.load("tiny", device="cpu").generate(request)
    assert {"attention", "channel_norm", "conv3d", "layer_norm", "rms_norm", "rope"} <= set(ran)
    said = answers()
    assert {name: {said[name]} for name in ran} == dict(ran)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_its_answers_are_what_is_dispatched(name, monkeypatch) -> None:
    """Every operation, as it is, with rivals, and forced; the implementations return their names instead of tensors."""
    operation = OPERATIONS[name]
    rivals = [
        Implementation("gpu", print, Constraints(devices=("cuda",)), priority=9),
        Implementation("half", print, Constraints(dtypes=(torch.float16,)), priority=8),
        Implementation("best", print, Constraints(devices=("cpu",)), priority=7),
        Implementation("second", print, priority=6),
    ]
    x = torch.randn(2, 3, 4, 128)

    def named(implementations: list[Implementation]) -> None:
        told = [replace(i, function=lambda *_, name=i.name: name) for i in implementations]
        monkeypatch.setattr(operation, "implementations", told)
        monkeypatch.setattr(operation, "eager", told[0].function)
        monkeypatch.setattr(operation, "_chosen", {})

    own = list(operation.implementations)
    named(own)
    assert answers()[name] == operation._run(x)

    named(own + rivals)
    said = examine()["operations"][name]["cpu float32"]
    assert said["uses"] == "best" == operation._run(x)
    others = said["others"]
    assert set(others) == {i.name for i in own + rivals} - {"best"}
    assert others["gpu"] == "needs device cuda, got cpu"
    assert others["half"].startswith("needs dtype float16")
    assert others["second"] == "could run, but best has priority 7 over 6"

    with force(**{name: "second"}):
        said = examine()["operations"][name]["cpu float32"]
        assert said["uses"] == "second" == operation._run(x)
        assert said["why"] == "forced"
        assert said["others"]["best"] == "could run, but second is forced"


def test_json_is_one_line_of_true_facts(doctor) -> None:
    code, out = doctor("--json")
    assert (code, out.count("\n")) == (0, 1)
    report = json.loads(out)
    assert report["problems"] == []
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["packages"]["torch"] == torch.__version__
    assert len(report["devices"]) == torch.cuda.device_count()
    assert set(report["operations"]) == set(OPERATIONS)
    assert 1 <= report["cpu_threads"] <= (os.cpu_count() or 1)
    assert report["memory"] > report["memory_free"] > 0
    assert report["encoders"] == {"H.264": None, "VP9": None}
    files = {role: Path(path) for role, path in report["embedded_models"]["tiny-i2v"].items()}
    assert {"high_noise", "low_noise", "vae", "text_encoder", "tokenizer"} == set(files)
    assert all(path.exists() for path in files.values())
    assert report["tokenizers"]["tiny"] == str(files["tokenizer"])


def test_plain_text_cuts_nothing(doctor) -> None:
    code, out = doctor()
    assert code == 0
    lines = out.splitlines()
    assert lines[-1] == "everything needed works"
    for name, places in examine()["operations"].items():
        for place, choice in places.items():
            (line,) = [line for line in lines if line.split()[:2] == [name, place.split()[0]]]
            assert f"{place}" in line
            assert choice["why"] in line
            for other, reason in choice["others"].items():
                assert f"{other}: {reason}" in line
    assert any(sys.executable in line for line in lines)


@pytest.mark.parametrize(
    ("capability", "dtype", "line"),
    [
        ([7, 5], "float16", "int8_block   8 bits have no kernel here (not measured, after NVIDIA's T4 datasheet)"),
        ([8, 0], "bfloat16", "int8_block   none within 0.015 is 3 times as fast (not measured, after NVIDIA's A100"),
        ([9, 0], "bfloat16", "int8_row   adds 0.0123, within 0.015; about 0.0154 against the original weights"),
        ([12, 0], "bfloat16", "int8_block   none within 0.015 is 3 times as fast (not measured, after NVIDIA's RTX"),
    ],
)
def test_what_auto_would_run_on_a_gpu(capability, dtype, line, doctor, monkeypatch) -> None:
    device = {"name": "a GPU", "capability": capability, "memory": 8 * 10**9, "memory_free": 10**9}
    monkeypatch.setattr(machine, "cuda_devices", lambda: [device])
    monkeypatch.setattr("turbowan.ops.registry._installed", lambda package: True)
    place = f"cuda {capability[0]}.{capability[1]} {dtype}"
    _, out = doctor()
    (found,) = [text for text in out.splitlines() if text.split()[:1] == ["int8_block"] and place in text]
    uses, why = line.split("   ")
    assert found.split(place)[1].split()[0] == uses
    assert why in found
    report = examine()["linears"]
    assert set(report) == {"cpu float32", place}
    assert report[place]["int8_block"]["uses"] == uses
    assert report[place]["int8_block"]["measured"] == (capability == [9, 0])
    assert {name: choice["uses"] for name, choice in report["cpu float32"].items()} == {f: f for f in FORMATS}


def test_the_encoders_are_tried(monkeypatch, tmp_path) -> None:
    def without(codec: str) -> Any:
        real = video.write_video

        def write(path: Path, *args: Any, **kwargs: Any) -> Path:
            if path.suffix == codec:
                raise ValueError(f"no {codec}\nencoder")
            return real(path, *args, **kwargs)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(video, "write_video", without(".webm"))
        report = examine()
    assert report["encoders"] == {"H.264": None, "VP9": "no .webm encoder"}
    assert (report["problems"], len(report["notes"])) == ([], 1)
    with monkeypatch.context() as patch:
        patch.setattr(video, "write_video", without(".mp4"))
        report = examine()
    assert report["encoders"] == {"H.264": "no .mp4 encoder", "VP9": None}
    assert "H.264 does not work (no .mp4 encoder)" in report["problems"][0]


@pytest.mark.parametrize(
    ("package", "version", "line"),
    [
        ("torch", "2.9.1", "PyTorch 2.9.1 breaks the VAE (its bfloat16 conv3d); install torch >= 2.10, or 2.8"),
        ("torch", "2.6.0", "PyTorch 2.6.0 is too old; install torch >= 2.7"),
        ("transformers", "4.9.0", "transformers 4.9.0 is too old; run: pip install 'transformers>=4.48'"),
        ("av", None, "the package av is missing; run: pip install 'av>=13'"),
        ("torch", None, "the package torch is missing; run: pip install 'torch>=2.7'"),
    ],
)
def test_what_is_missing_is_said_with_exit_code_2(doctor, monkeypatch, package, version, line) -> None:
    real = machine._version
    monkeypatch.setattr(machine, "_version", lambda name: version if name == package else real(name))
    code, out = doctor()
    assert code == 2
    assert out.splitlines()[-1] == f"problem: {line}"
    code, out = doctor("--json")
    assert code == 2
    assert json.loads(out)["problems"] == [line]


def run_copy(folder: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "turbowan", "doctor", "--json"]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)


def test_an_embedded_model_that_is_not_whole(tmp_path) -> None:
    """In a copy of the package with a file cut short; a tokenizer lies in its hub cache."""
    shutil.copytree(PACKAGE, tmp_path / "turbowan", ignore=shutil.ignore_patterns("__pycache__"))
    tiny = tmp_path / "turbowan" / "assets" / "tiny"
    commit = "0" * 40
    snapshot = tmp_path / "cache" / "models--google--umt5-xxl" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    shutil.copy(tiny / "tokenizer" / "spiece.model", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    whole = (tiny / "vae.safetensors").read_bytes()
    (tiny / "vae.safetensors").write_bytes(whole[: np.random.default_rng().integers(8, len(whole))])

    done = run_copy(tmp_path)
    assert done.returncode == 2, done.stderr
    report = json.loads(done.stdout)
    assert report["embedded_models"] == {"tiny": None, "tiny-base": None, "tiny-i2v": None}  # they share the file
    assert len(report["problems"]) == 3
    assert report["problems"][0].startswith("the embedded model tiny is not whole (")
    assert str(tiny / "vae.safetensors") in report["problems"][0]
    assert report["problems"][0].endswith("; install turbowan again")
    assert report["tokenizers"] == {"tiny": None, "google/umt5-xxl": str(snapshot)}
