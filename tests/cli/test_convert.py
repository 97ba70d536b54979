"""`turbowan convert`: what it prints, what it writes, and that bad input ends in one line, exit code 2 and no file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import turbowan
from turbowan.checkpoints.files import read_tensors, write_tensors
from turbowan.models.vae import WanVAE

TINY = Path(turbowan.__file__).parent / "assets" / "tiny"


def test_prints_what_it_wrote(command_line: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    vae = tmp_path / "vae.safetensors"
    write_tensors(vae, WanVAE(16).bfloat16().state_dict())
    code, out, err = command_line("convert", vae, tmp_path / "vae", "--to", "diffusers")
    assert (code, err) == (0, "")
    names = ("diffusion_pytorch_model.safetensors", "config.json")
    assert out.split() == [str(tmp_path / "vae" / name) for name in names]
    code, out, _ = command_line("convert", tmp_path / "vae", tmp_path / "back.pth", "--to", "official")
    assert (code, out) == (0, f"{tmp_path / 'back.pth'}\n")
    before, after = read_tensors(vae), read_tensors(tmp_path / "back.pth")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_tokenizer_option(command_line: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    text, spiece = TINY / "text_encoder.safetensors", TINY / "tokenizer" / "spiece.model"
    code, _, _ = command_line("convert", text, tmp_path / "comfy.safetensors", "--to", "comfy", "--tokenizer", spiece)
    assert code == 0
    assert bytes(read_tensors(tmp_path / "comfy.safetensors")["spiece_model"].tolist()) == spiece.read_bytes()
    code, _, err = command_line("convert", tmp_path / "comfy.safetensors", tmp_path / "plain.pth", "--to", "official")
    assert code == 0
    assert err.startswith("turbowan: note: the tokenizer inside")


def test_bad_input(command_line: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    whole = (TINY / "vae.safetensors").read_bytes()
    (tmp_path / "in" / "cut.safetensors").write_bytes(whole[:1_000_000])
    (tmp_path / "in" / "empty.pth").write_bytes(b"")
    cases = {
        ("cut.safetensors", "out.pth", "official"): "cut.safetensors (1,000,000 bytes) is not a readable",
        ("empty.pth", "out.pth", "official"): "empty.pth is empty (0 bytes)",
        ("missing.pth", "out.pth", "official"): "missing.pth does not exist",
        (TINY / "vae.safetensors", "out.pth", "gguf"): "there is no layout 'gguf'",
        (TINY / "vae.safetensors", "out.txt", "official"): "out.txt: weights end in one of",
        (TINY, "out.pth", "official"): "holds 3 weight files",
        (TINY / "transformer.safetensors", "out", "diffusers"): "has no place for int8_block weights",
    }
    for (source, target, to), message in cases.items():
        code, out, err = command_line("convert", tmp_path / "in" / source, tmp_path / target, "--to", to)
        assert code == 2, message
        assert out == ""
        assert message in err
        assert err.startswith("turbowan: ")
        assert err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["in"]


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.path}",))


def test_a_pickle_bomb_does_not_go_off(tmp_path: Path) -> None:
    """As a user runs it, in a process of its own."""
    torch.save({"head.modulation": Bomb(tmp_path / "fired")}, tmp_path / "bomb.pth")
    command = [sys.executable, "-m", "turbowan", "convert", "bomb.pth", "out.safetensors", "--to", "official"]
    environment = {**os.environ, "PYTHONPATH": str(Path(turbowan.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "bomb.pth" in done.stderr
    assert "holds pickled objects other than tensors" in done.stderr
    assert os.listdir(tmp_path) == ["bomb.pth"]
