"""`turbowan train shards | sla | rcm | merge | export`: one small training from end to end, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from turbowan.checkpoints import load_transformer
from turbowan.checkpoints.files import read_tensors, write_tensors
from turbowan.checkpoints.official import write_transformer
from turbowan.models.transformer import TransformerConfig, WanTransformer
from turbowan.train.shards import Shards

CommandLine = Callable[..., tuple[int, str, str]]

WORLD = """
[world]
frames = 9
height = 64
width = 96
camera_share = 0.2
pool_start = 4
pool_size = 4
refresh_clips = 4
"""
SLA = """
[trainer]
steps = 4
batch = 2
lr = { student = 1e-3 }
warmup = 1
log_steps = 2

[sla]
top_k = 0.5
blocks = [[32, 16]]
"""
RCM = """
[trainer]
steps = 4
batch = 2
lr = { student = 1e-4, critic = 1e-4 }
warmup = 1
log_steps = 2

[rcm]
guidance_scale = 3.0
student_every = 2
simulation_times = "sampler"
top_k = 0.5
"""


@pytest.fixture
def files(tmp_path: Path, fresh_seed: int) -> Path:
    """A folder with a small teacher's file and a configuration of each stage."""
    net = WanTransformer(TransformerConfig(dim=128, ffn_dim=96, num_layers=1, text_dim=128))
    write_tensors(tmp_path / "teacher.safetensors", write_transformer(net.state_dict()))
    for name, text in (("sla", SLA + WORLD), ("rcm", RCM + WORLD), ("image", RCM + WORLD + "image = true\n")):
        (tmp_path / f"{name}.toml").write_text(text)
    return tmp_path


def test_from_the_world_to_a_merged_student(command_line: CommandLine, files: Path) -> None:
    teacher, data = files / "teacher.safetensors", files / "data"

    def train(*arguments: object) -> tuple[str, str]:
        code, out, err = command_line("train", *arguments)
        assert code == 0, err
        return out, err

    out, _ = train("shards", "--out", data, "--count", 5, "--per-shard", 3, "--config", files / "sla.toml")
    assert out == f"{data}\n"
    assert sorted(path.name for path in data.iterdir()) == ["negative.pt", "shard_000000.tar", "shard_000001.tar"]
    assert Shards(data).shapes["latent"] == (16, 3, 8, 12)

    how = ("sla", "--out", files / "sla", "--teacher", teacher, "--config", files / "sla.toml", "--device", "cpu")
    code, _, err = command_line("train", *how, "--data", data, "--frames", 4)
    assert (code, err.splitlines()) == (2, [err.strip()])
    assert "has 3 latent frames, fewer than the 4 to be kept" in err
    on_shards = (*how, "--data", data / "*.tar", "--frames", 2)
    out, _ = train(*on_shards, "--max-minutes", 0)
    assert out.endswith(f"{files / 'sla'}: not done yet; run again to go on\n")
    out, _ = train(*on_shards)
    aligned = files / "sla" / "transformer.safetensors"
    assert out.splitlines()[-1] == str(aligned)
    lines = [json.loads(line) for line in (files / "sla" / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["alignment"] > 0 for line in lines)
    assert load_transformer(aligned).config.has_sla

    config = ("--config", files / "rcm.toml")
    out, _ = train("rcm", "--out", files / "rcm", "--teacher", teacher, *config, "--init", aligned, "--device", "cpu")
    student = files / "rcm" / "transformer.safetensors"
    assert out.splitlines()[-1] == str(student)
    first, _ = (files / "rcm" / "curve.jsonl").read_text().splitlines()
    assert {"consistency", "score", "critic"} < json.loads(first).keys()

    critic = files / "critic.safetensors"
    out, _ = train("export", files / "rcm", "--out", critic, "--to", "wan", "--net", "critic")
    assert out == f"{critic}\n"
    assert not load_transformer(critic).config.has_sla

    merged = files / "merged.safetensors"
    out, _ = train("merge", critic, teacher, aligned, "--out", merged, "--weight", 0.5, "--to", "official")
    new = "2 (e.g. blocks.0.self_attn.proj_l.bias) copied from the diff target"
    assert out.splitlines()[-1].endswith(f"0 kept from the base, {new}")
    base, before, after, result = (load_transformer(path).state_dict() for path in (critic, teacher, aligned, merged))
    for key, value in before.items():
        wanted = base[key] + 0.5 * (after[key] - value)
        assert torch.allclose(result[key], wanted, rtol=2**-7, atol=1e-6), key  # bfloat16, as the base
    assert read_tensors(merged)["blocks.0.self_attn.q.weight"].dtype == torch.bfloat16


def test_what_is_refused(command_line: CommandLine, files: Path) -> None:
    run = ("--out", files / "run", "--teacher", files / "teacher.safetensors", "--device", "cpu")
    cases = {
        ("rcm", *run, "--config", files / "rcm.toml", "--frames", 2): "--frames is of the clips of --data",
        ("sla", *run, "--config", files / "sla.toml", "--negative", files / "n.pt"): "--negative is of the clips",
        ("sla", *run, "--config", files / "rcm.toml"): "takes the tables trainer, world, sla; got trainer, rcm, world",
        ("sla", *run, "--config", files / "sla.toml", "--data", files): "there is no .tar shard at",
        ("rcm", *run, "--config", files / "rcm.toml", "--model", "tinny"): "there is no model 'tinny'",
        ("rcm", *run, "--config", files / "image.toml"): "0 condition channels; the data has 128 and 20",
        ("export", files, "--out", files / "x.pth"): "holds no training state",
    }
    for arguments, message in cases.items():
        code, out, err = command_line("train", *arguments)
        assert (code, out) == (2, ""), message
        assert message in err
        assert len(err.splitlines()) == 1, err
        assert not (files / "run" / "transformer.safetensors").exists()
