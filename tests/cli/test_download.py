"""`turbowan download` as a user runs it, against a hub on the loopback, up to a model that generates."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from turbowan.checkpoints import load_transformer
from turbowan.checkpoints.families import WRITERS
from turbowan.checkpoints.files import write_tensors
from turbowan.checkpoints.load import read
from turbowan.checkpoints.published import PUBLISHED
from turbowan.cli.main import main
from turbowan.engine import EMBEDDED, Engine
from turbowan.request import GenerateRequest

TINY = EMBEDDED / "tiny"
ROOT = Path(__file__).parents[2]
BASE = PUBLISHED["umt5-xxl-tokenizer"].repo
SPIECE = "google/umt5-xxl/spiece.model"


@pytest.fixture
def turbowan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command line in this process: exit code, standard output, standard error."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["turbowan", *map(str, args)])
        with pytest.raises(SystemExit) as exited:
            main()
        out, err = capsys.readouterr()
        return int(exited.value.code or 0), out, err

    return run


@pytest.fixture
def tiny_as_published(loopback_hub: Any, tmp_path: Path) -> Any:
    """The embedded model on the hub under the official names, as .pth files in the official layout."""
    contents = {}
    for role in ("transformer", "vae", "text_encoder"):
        state, _ = read(TINY / f"{role}.safetensors", role)
        path = tmp_path / "made" / f"{role}.pth"
        write_tensors(path, WRITERS[role, "official"](state))
        contents[role] = path.read_bytes()
        path.unlink()
    loopback_hub.repos[BASE] = {
        "README.md": b"about",
        "Wan2.1_VAE.pth": contents["vae"],
        "models_t5_umt5-xxl-enc-bf16.pth": contents["text_encoder"],
        SPIECE: (TINY / "tokenizer" / "spiece.model").read_bytes(),
    }
    model = PUBLISHED["turbowan2.1-t2v-1.3b-480p"]
    loopback_hub.repos[model.repo] = {"TurboWan2.1-T2V-1.3B-480P.pth": contents["transformer"]}
    return loopback_hub


@pytest.mark.filterwarnings("ignore:.* steps are too few")
def test_from_the_name_to_a_video(tiny_as_published, turbowan, tmp_path) -> None:
    folder = tmp_path / "model"
    code, out, err = turbowan("download", "TurboDiffusion/TurboWan2.1-T2V-1.3B-480P", "--plain", "-o", folder)
    assert (code, err) == (0, "")
    sizes = {path: len(content) for files in tiny_as_published.repos.values() for path, content in files.items()}
    for path in ("TurboWan2.1-T2V-1.3B-480P.pth", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", SPIECE):
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [path]]
        assert re.search(r"  \d+\.\d (MB|kB)  +to come  ", line)
        number, unit = line.split()[1:3]
        assert float(number) * {"MB": 1e6, "kB": 1e3}[unit] == pytest.approx(sizes[path], rel=0.06)
    assert out.splitlines()[-1] == f"all here and checked: turbowan generate --model {folder} --prompt PROMPT"

    engine = Engine.load(folder, device="cpu")
    assert (engine.manifest.family, engine.manifest.name) == ("turbo-t2v", "turbowan2.1-t2v-1.3b-480p")
    assert (engine.manifest.sampler, engine.manifest.num_steps, engine.manifest.resolution) == ("rcm", 4, "480p")
    request = GenerateRequest(
        prompt="a red circle moves right on a blue background", width=64, height=64, num_frames=5,
        num_steps=1, sampler="rcm", sigma_max=80.0, guidance_scale=1.0, attention="original", seed=int(time.time()),
    )  # fmt: skip
    ours, embedded = engine.generate(request), Engine.load("tiny", device="cpu").generate(request)
    np.testing.assert_array_equal(ours.frames, embedded.frames)

    tiny_as_published.requests.clear()
    code, out, _ = turbowan("download", "turbowan2.1-t2v-1.3b-480p", "--plain", "-o", folder)
    assert code == 0
    assert "0 bytes to come" in out
    assert all(path.startswith("/api/") for _, path, _ in tiny_as_published.requests)


def test_a_sharded_set_loads(tiny_as_published, turbowan, tmp_path) -> None:
    state, _ = read(TINY / "transformer.safetensors", "transformer")
    state = WRITERS["transformer", "wan"](state)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shards = {name: {key: state[key] for key in sorted(state)[i::2]} for i, name in enumerate(names)}
    contents = {}
    for name, shard in shards.items():
        write_tensors(tmp_path / "made" / name, shard)
        contents[name] = (tmp_path / "made" / name).read_bytes()
    index = {"weight_map": {key: name for name, shard in shards.items() for key in shard}}
    contents["diffusion_pytorch_model.safetensors.index.json"] = json.dumps(index).encode()
    model = PUBLISHED["wan2.1-t2v-14b"]
    tiny_as_published.repos[model.repo] = contents

    folder = tmp_path / "models" / "wan"
    code, _, err = turbowan("download", model.name, "-o", folder)
    assert (code, err) == (0, "")
    engine = Engine.load(folder, device="cpu")
    assert engine.manifest.family == "wan2.1-t2v"
    assert (engine.manifest.shift, engine.manifest.guidance_scale, engine.manifest.resolution) == (5.0, 5.0, "720p")
    net = load_transformer(engine.manifest.files["transformer"])
    weights = sum(value.nbytes for value in net.state_dict().values())
    assert engine.part_sizes(torch.float32)["transformer"].total == weights  # all of them found


def test_errors_are_one_line_and_exit_code_2(loopback_hub, turbowan, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for args, line in (
        (["turbowan2.1-t2v-1.3b"], "did you mean turbowan2.1-t2v-1.3b-480p"),
        ([], "name a model; 'turbowan download --list' shows them"),
        (["wan2.1-t2v-1.3b", "--quant"], "no published int8 weights"),
        (["wan2.1-t2v-1.3b"], "is not at http://127.0.0.1"),
    ):
        code, out, err = turbowan("download", *args)
        assert (code, out) == (2, "")
        assert err.startswith("turbowan: ")
        assert line in err
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_list_names_every_model(turbowan) -> None:
    code, out, _ = turbowan("download", "--list")
    assert code == 0
    for model in PUBLISHED.values():
        assert re.search(rf"^  {re.escape(model.name)} .* {re.escape(model.repo)}$", out, re.MULTILINE)


def test_dry_run_shows_sizes_and_makes_nothing(tiny_as_published, turbowan, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = turbowan("download", "turbowan2.1-t2v-1.3b-480p", "--plain", "--dry-run")
    assert code == 0
    total = sum(len(c) for files in tiny_as_published.repos.values() for p, c in files.items() if p != "README.md")
    assert re.search(rf"^  total +{total / 1e6:.1f} MB +{total / 1e6:.1f} MB to come +.* free$", out, re.MULTILINE)
    assert out.startswith("checkpoints/turbowan2.1-t2v-1.3b-480p\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_tokenizer_alone(tiny_as_published, turbowan, tmp_path) -> None:
    code, out, _ = turbowan("download", "umt5-xxl-tokenizer", "-o", tmp_path / "t")
    assert code == 0
    assert out.splitlines()[-1] == f"all here and checked: --tokenizer {tmp_path / 't' / 'google/umt5-xxl'}"
    assert (tmp_path / "t" / SPIECE).read_bytes() == (TINY / "tokenizer" / "spiece.model").read_bytes()


def test_ctrl_c_keeps_what_came(loopback_hub, turbowan, tmp_path) -> None:
    """In a process of its own, quiet because standard error is no terminal."""
    content = os.urandom(30_000_000)
    loopback_hub.repos[BASE] = {SPIECE: content}
    loopback_hub.stall[SPIECE] = 25_000_000
    command = [sys.executable, "-m", "turbowan", "download", "umt5-xxl-tokenizer", "-o", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background may ignore it
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while sum(path.stat().st_size for path in tmp_path.rglob(".*.part")) < 10_000_000:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(12):  # now and then Python loses one in a finalizer; a user presses again
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            _, err = process.communicate(timeout=5)
            break
    assert process.returncode == 130
    assert err in ("", "turbowan: stopped\n")
    assert not (tmp_path / SPIECE).exists()
    (partial,) = tmp_path.rglob(".*.part")
    have = partial.stat().st_size
    assert partial.read_bytes() == content[:have]

    loopback_hub.stall.clear()
    loopback_hub.requests.clear()
    code, out, _ = turbowan("download", "umt5-xxl-tokenizer", "-o", tmp_path)
    assert code == 0
    assert f"{(len(content) - have) / 1e6:.1f} MB to come" in out
    assert [headers["Range"] for headers in loopback_hub.gets(SPIECE)] == [f"bytes={have}-"]
    assert (tmp_path / SPIECE).read_bytes() == content
