"""The manifest: written and read back, held to its limits, and guessed from bare files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbowan import Engine
from turbowan.checkpoints.convert import convert_checkpoint
from turbowan.checkpoints.files import write_tensors
from turbowan.checkpoints.manifest import (
    FILE_NAME,
    Manifest,
    find_in_folder,
    from_defaults,
    guess_manifest,
    read_manifest,
    write_manifest,
)
from turbowan.errors import CheckpointError
from turbowan.specs import FAMILIES

State = dict[str, Tensor]
FILES = ("transformer", "vae", "text_encoder")


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, tmp_path: Path) -> None:
    roles = ("high_noise", "low_noise", *FILES[1:]) if "2.2" in family else FILES
    files = {role: tmp_path / "weights" / f"{role}.pth" for role in roles}
    manifest = from_defaults("über model", family, files)
    path = write_manifest(manifest, tmp_path)
    assert path == tmp_path / FILE_NAME
    assert read_manifest(path) == manifest
    assert read_manifest(tmp_path) == manifest
    assert str(tmp_path) not in path.read_text(encoding="utf-8")  # files inside the folder: it can be moved


def test_round_trip_of_odd_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {role: tmp_path / f'a "quoted" {role}\\.pth' for role in FILES}
    manifest = Manifest(
        name='a "name"\nwith\ttwo lines', family="x", files=files, sampler="euler", num_steps=7, sigma_max=1e-5,
        shift=3, guidance_scale=0.5, boundary=0, negative_prompt="低质量 \\ '", attention="sagesla", sla_topk=1,
        resolution="1080p", width=48, height=4096, num_frames=1, fps=240, distilled=False, notes="kept, not compared",
    )  # fmt: skip
    assert read_manifest(write_manifest(manifest, tmp_path)) == manifest
    assert read_manifest(tmp_path).notes == "kept, not compared"
    monkeypatch.chdir(tmp_path)  # relative and outside paths are found again, too
    inside = replace(manifest, files={**files, "vae": Path("sub/vae.pth"), "tokenizer": Path("/elsewhere/tokenizer")})
    write_manifest(inside, Path("sub"))
    assert read_manifest(Path("sub")).files["vae"] == Path("sub/vae.pth")
    assert read_manifest(Path("sub")).files["tokenizer"] == Path("/elsewhere/tokenizer")


GOOD = """format = 1
name = "mine"
family = "turbo-t2v"

[sampling]
sampler = "rcm"
num_steps = 4

[files]
transformer = "a.pth"
vae = "b.pth"
text_encoder = "c.pth"
"""


def test_sections_are_for_the_eye(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(GOOD)
    manifest = read_manifest(tmp_path)
    assert (manifest.sampler, manifest.num_steps, manifest.sigma_max) == ("rcm", 4, 80.0)
    assert manifest.experts == {"single": tmp_path / "a.pth"}
    (tmp_path / FILE_NAME).write_text(GOOD.replace("[sampling]\n", ""))
    assert read_manifest(tmp_path) == manifest


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format = 1", "format = 2", "not a manifest of format 1"),
        ("format = 1\n", "", "not a manifest of format 1"),
        ('"mine"', "mine", "not a readable manifest"),
        ('name = "mine"\n', "", "has no name"),
        ("num_steps = 4", "", "has no num_steps"),
        ("num_steps = 4", "num_steps = 4\ncolour = 1", "unknown key colour; known keys: attention, boundary"),
        ("num_steps = 4", "num_steps = 0", "num_steps must be from 1 to 1000, got 0"),
        ("num_steps = 4", 'num_steps = "four"', "num_steps must be a whole number, got 'four'"),
        ("num_steps = 4", "num_steps = 4.5", "num_steps must be a whole number, got 4.5"),
        ("num_steps = 4", "num_steps = true", "num_steps must be a whole number, got True"),
        ('"rcm"', '"ddim"', "sampler must be one of rcm, euler, unipc, got 'ddim'"),
        ('"rcm"', "3", "sampler must be text in quotes, got 3"),
        ("num_steps = 4", "num_steps = 4\nsigma_max = -80", "sigma_max must be positive, got -80"),
        ("num_steps = 4", "num_steps = 4\nsigma_max = nan", "sigma_max must be a number, got nan"),
        ("num_steps = 4", "num_steps = 4\nboundary = 1.5", "boundary must be from 0 to 1, got 1.5"),
        ("num_steps = 4", "num_steps = 4\nsla_topk = 0", r"sla_topk must be in \(0, 1\], got 0"),
        ("num_steps = 4", 'num_steps = 4\nattention = "flash"', "attention must be one of auto, .*got 'flash'"),
        ("num_steps = 4", 'num_steps = 4\nresolution = "8k"', "resolution must be one of 480, .*got '8k'"),
        ("num_steps = 4", "num_steps = 4\nwidth = 100\nheight = 64", "width must be a multiple of 16.*got 100"),
        ("num_steps = 4", "num_steps = 4\nwidth = 64", "only width is given"),
        ("num_steps = 4", "num_steps = 4\nnum_frames = 80", r"num_frames must be 4k\+1, got 80 \(nearest: 77 or 81\)"),
        ("num_steps = 4", "num_steps = 4\nfps = 0", "fps must be from 1 to 240, got 0"),
        ("num_steps = 4", 'num_steps = 4\ndistilled = "yes"', "distilled must be true or false, got 'yes'"),
        ('transformer = "a.pth"', 'dit = "a.pth"', r"\[files\] takes transformer, .*got dit"),
        ('transformer = "a.pth"', "transformer = 3", "the transformer must be a path in quotes, got 3"),
        ('transformer = "a.pth"\n', "", "needs either a transformer, or a high_noise and a low_noise expert; got none"),
        ('transformer = "a.pth"', 'high_noise = "a.pth"', "needs either a transformer, .*; got high_noise"),
        ('vae = "b.pth"\n', "", "has no vae; give the file's path"),
        ("[files]", "[[files]]", r"\[files\] takes transformer"),
    ],
)
def test_bad_manifests(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert GOOD.count(old) == 1
    path = tmp_path / FILE_NAME
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(CheckpointError, match=message) as error:
        read_manifest(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_manifest_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"turbowan\.toml does not exist"):
        read_manifest(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="not a readable manifest"):
        read_manifest(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty holds no weights and no turbowan\.toml"):
        find_in_folder(tmp_path / "empty")


@pytest.fixture
def parts(tmp_path: Path, vae_state: State, text_state: State) -> dict[str, Path]:
    """A VAE and a text encoder under the names of the original repositories, in a folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save(vae_state, folder / "Wan2.1_VAE.pth")
    torch.save(text_state, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return {"vae": folder / "Wan2.1_VAE.pth", "text_encoder": folder / "models_t5_umt5-xxl-enc-bf16.pth"}


@pytest.mark.parametrize(
    ("kind", "to", "experts", "family"),
    [
        ("t2v-sla", "official", 1, "turbo-t2v"),
        ("t2v", "official", 1, "turbo-t2v"),
        ("i2v-sla", "official", 2, "turbo-i2v"),
        ("t2v-sla", "comfy", 1, "turbo-t2v"),
        ("t2v", "wan", 1, "wan2.1-t2v"),
        ("t2v", "comfy", 1, "wan2.1-t2v"),
        ("i2v-2.1", "wan", 1, "wan2.1-i2v"),
        ("t2v", "diffusers", 2, "wan2.2-t2v"),
        ("i2v", "wan", 2, "wan2.2-i2v"),
    ],
)
def test_guessing_from_the_tensors(
    kind: str, to: str, experts: int, family: str,
    tmp_path: Path, parts: dict[str, Path], transformer_state: Callable[..., State],
) -> None:  # fmt: skip
    torch.save(transformer_state(kind), tmp_path / "official.pth")
    for role in ("high_noise", "low_noise") if experts == 2 else ("transformer",):
        parts[role] = tmp_path / f"{role}.safetensors"
        convert_checkpoint(tmp_path / "official.pth", parts[role], to)
    manifest = guess_manifest("mine", parts)
    assert manifest.family == family
    assert manifest == from_defaults("mine", family, parts)
    assert manifest.two_experts == (experts == 2)


def test_guessing_lightx2v(tmp_path: Path, parts: dict[str, Path], transformer_state: Callable[..., State]) -> None:
    state = transformer_state("i2v")
    key = "blocks.0.ffn.0.weight"
    state |= {key: torch.ones(384, 256, dtype=torch.int8), f"{key}_scale": torch.ones(384, 1)}
    torch.save(state, tmp_path / "x.pth")
    manifest = guess_manifest("mine", {**parts, "transformer": tmp_path / "x.pth"})
    assert (manifest.family, manifest.sampler, manifest.num_steps) == ("lightx2v-i2v", "euler", 4)


def test_guessing_needs_a_transformer_and_all_parts(
    tmp_path: Path, parts: dict[str, Path], transformer_state: Callable[..., State]
) -> None:
    with pytest.raises(CheckpointError, match="no transformer is given: name --transformer, or --high-noise"):
        guess_manifest("mine", parts)
    with pytest.raises(CheckpointError, match=r"is a Wan VAE.*diffusion transformer is wanted"):
        guess_manifest("mine", {**parts, "transformer": parts["vae"]})
    torch.save(transformer_state("t2v"), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="mine has no vae and no text_encoder"):
        guess_manifest("mine", {"transformer": tmp_path / "x.pth"})


def test_a_folder_of_the_original_repository(
    tmp_path: Path, parts: dict[str, Path], transformer_state: Callable[..., State], spiece: Path
) -> None:
    """Weights of all roles side by side, the transformer in shards, the tokenizer in its own folder."""
    folder = parts["vae"].parent
    wan = {k: v.unflatten(1, (-1, 1, 2, 2)) if v.shape[1:] == (64,) and "patch" in k else v
           for k, v in transformer_state("t2v").items()}  # fmt: skip
    keys = sorted(wan)
    index = {}
    for name, some in (("a.safetensors", keys[:20]), ("b.safetensors", keys[20:])):
        write_tensors(folder / name, {key: wan[key] for key in some})
        index |= dict.fromkeys(some, name)
    (folder / "x.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "spiece.model").write_bytes(spiece.read_bytes())
    manifest = find_in_folder(folder)
    assert manifest.name == "model"
    assert manifest.family == "wan2.1-t2v"
    assert {role: path.name for role, path in manifest.files.items()} == {
        "transformer": "x.safetensors.index.json",
        "vae": "Wan2.1_VAE.pth",
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": "umt5-xxl",
    }
    assert Engine.load(folder, device="cpu").config.dim == 256

    torch.save(transformer_state("t2v"), folder / "second.pth")
    with pytest.raises(CheckpointError, match="two files that can be its transformer"):
        find_in_folder(folder)


def test_a_folder_with_two_experts(parts: dict[str, Path], transformer_state: Callable[..., State]) -> None:
    folder = parts["vae"].parent
    for name in ("TurboWan-high-720P.pth", "TurboWan-low-720P.pth"):
        torch.save(transformer_state("i2v-sla"), folder / name)
    manifest = find_in_folder(folder)
    assert {role: path.name for role, path in manifest.experts.items()} == {
        "high": "TurboWan-high-720P.pth",
        "low": "TurboWan-low-720P.pth",
    }
    for name in os.listdir(folder):
        if name.startswith("Turbo"):
            (folder / name).unlink()
    for expert in ("high_noise_model", "low_noise_model"):  # as Wan 2.2's repositories have them
        write_tensors(folder / expert / "diffusion_pytorch_model.safetensors", transformer_state("i2v"))
    assert find_in_folder(folder).experts == {"high": folder / "high_noise_model", "low": folder / "low_noise_model"}


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("Wan2.2_T2V_High_noise_fp8", "Wan2.2_T2V_Low_noise_fp8"),
        ("wan2.2_i2v_high_noise_14B", "wan2.2_i2v_low_noise_14B"),
        ("Wan2_2-I2V-A14B-HIGH_fp8", "Wan2_2-I2V-A14B-LOW_fp8"),
        ("Wan2.2-I2V-A14B-HighNoise", "Wan2.2-I2V-A14B-LowNoise"),
        ("wan22highnoise", "wan22lownoise"),
        ("i2vHigh", "i2vLow"),
        ("wan22I2VHigh", "wan22I2VLow"),
        ("high", "low"),
        ("yellow_flow_high", "yellow_flow_low"),
        ("slow-highway-high-720P", "slow-highway-low-720P"),
    ],
)
def test_experts_are_told_by_whole_words_of_their_names(
    high: str, low: str, parts: dict[str, Path], transformer_state: Callable[..., State]
) -> None:
    folder = parts["vae"].parent
    for name in (high, low):
        torch.save(transformer_state("i2v-sla"), folder / f"{name}.pth")
    experts = {name: path.stem for name, path in find_in_folder(folder).experts.items()}
    assert experts == {"high": high, "low": low}


@pytest.mark.parametrize("name", ["wan-flow-tuned", "slow_motion", "yellow", "Glowing", "highway", "flowHigher"])
def test_parts_of_words_make_no_expert(
    name: str, parts: dict[str, Path], transformer_state: Callable[..., State]
) -> None:
    path = parts["vae"].parent / f"{name}.pth"
    torch.save(transformer_state("t2v-sla"), path)
    assert find_in_folder(path.parent).experts == {"single": path}


@pytest.mark.parametrize("experts", [1, 2])
def test_a_diffusers_folder(
    experts: int, tmp_path: Path, parts: dict[str, Path], transformer_state: Callable[..., State], spiece: Path
) -> None:
    torch.save(transformer_state("i2v" if experts == 2 else "t2v"), tmp_path / "official.pth")
    pipe = tmp_path / "Wan-Diffusers"
    for name in ("transformer", "transformer_2")[:experts]:
        convert_checkpoint(tmp_path / "official.pth", pipe / name, "diffusers")
    for role in ("vae", "text_encoder"):
        convert_checkpoint(parts[role], pipe / role, "diffusers")
    (pipe / "tokenizer").mkdir()
    (pipe / "tokenizer" / "spiece.model").write_bytes(spiece.read_bytes())
    facts = {"_class_name": "WanPipeline", **({"boundary_ratio": 0.875} if experts == 2 else {})}
    (pipe / "model_index.json").write_text(json.dumps(facts))
    manifest = find_in_folder(pipe)
    assert manifest.name == "Wan-Diffusers"
    assert manifest.family == ("wan2.2-i2v" if experts == 2 else "wan2.1-t2v")
    assert manifest.boundary == (0.875 if experts == 2 else 0.9)
    names = {"high": "transformer", "low": "transformer_2"} if experts == 2 else {"single": "transformer"}
    assert manifest.experts == {name: pipe / part for name, part in names.items()}
    assert Engine.load(pipe, device="cpu").config.in_dim == (36 if experts == 2 else 16)

    (pipe / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model_index\.json is not readable JSON"):
        find_in_folder(pipe)
