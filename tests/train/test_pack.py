"""From the stages' files to model folders that generate."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from turbowan import Engine, GenerateRequest
from turbowan.checkpoints import load_transformer, load_vae
from turbowan.checkpoints.files import read_tensors, write_tensors
from turbowan.checkpoints.manifest import read_manifest
from turbowan.errors import CheckpointError, RequestError
from turbowan.models.vae import WanVAE
from turbowan.train.flow import FlowConfig, FlowModel, export
from turbowan.train.pack import KINDS, pack_model
from turbowan.train.sla import with_sla
from turbowan.train.tokenizer import VOCABULARY

SIZE: dict[str, Any] = {"width": 48, "height": 32, "num_frames": 5, "seed": 3}
Files = tuple[Path, dict[str, Path]]


@pytest.fixture
def files(tmp_path: Path, tiny: Path, fresh_seed: int) -> Files:
    """The transformer and the other files of an untrained model whose weights all count."""
    model = FlowModel(FlowConfig(minutes=1, dim=256, ffn_dim=256, layers=1, text_dim=64, text_layers=1), VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    flow = tmp_path / "flow"
    export(model, flow)
    vae = flow / "vae.safetensors"
    write_tensors(vae, {key: value.to(torch.bfloat16) for key, value in WanVAE(16).state_dict().items()})
    tokenizer = tiny / "tokenizer" / "spiece.model"
    others = {"vae": vae, "text_encoder": flow / "text_encoder.safetensors", "tokenizer": tokenizer}
    return flow / "transformer.safetensors", others


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("kind", ["base", "t2v"])
def test_a_packed_model_stands_alone_and_generates(tmp_path: Path, files: Files, kind: str, quantize: bool) -> None:
    transformer, others = files
    out = tmp_path / "mine"
    manifest = pack_model(out, kind, {"transformer": transformer}, others, quantize=quantize)
    assert manifest == out / "turbowan.toml"
    assert (read_manifest(manifest).name, read_manifest(manifest).sampler) == ("mine", KINDS[kind]["sampler"])
    for name in ("transformer", "vae"):
        state = read_tensors(out / f"{name}.safetensors")
        assert any(value.dtype == torch.int8 for value in state.values()) == quantize
    assert (out / "tokenizer" / "spiece.model").read_bytes() == others["tokenizer"].read_bytes()
    shutil.rmtree(transformer.parent)
    steps = None if kind == "t2v" else 10
    video = Engine.load(out, device="cpu").generate(GenerateRequest("a red circle", num_steps=steps, **SIZE)).frames
    assert (video.shape, video.dtype) == ((5, 32, 48, 3), np.dtype(np.uint8))
    assert video.std() > 0


def test_two_experts_with_sla_share_another_models_files(tmp_path: Path, files: Files, fresh_seed: int) -> None:
    transformer, others = files
    pack_model(tmp_path / "base", "base", {"transformer": transformer}, others)
    config = FlowConfig(minutes=1, dim=256, ffn_dim=256, layers=1, text_dim=64, text_layers=1, image=True)
    experts = {role: tmp_path / f"{role}.safetensors" for role in ("high_noise", "low_noise")}
    for path in experts.values():
        net = with_sla(FlowModel(config, VOCABULARY).transformer)
        write_tensors(path, {key: value.to(torch.bfloat16) for key, value in net.state_dict().items()})
    pack_model(tmp_path / "moving", "i2v", experts, tmp_path / "base", sla_topk=0.5)
    names = {path.name for path in (tmp_path / "moving").iterdir()}
    assert names == {"turbowan.toml", "high_noise.safetensors", "low_noise.safetensors"}
    (tmp_path / "away").mkdir()
    for name in ("base", "moving"):  # both folders together can go elsewhere
        shutil.move(tmp_path / name, tmp_path / "away" / name)
    engine = Engine.load(tmp_path / "away" / "moving", device="cpu")
    request = GenerateRequest("the camera pans left", image=np.full((40, 60, 3), 90, np.uint8), **SIZE)
    result = engine.generate(request)
    assert result.frames.shape == (5, 32, 48, 3)
    assert (result.settings["attention"], result.settings["sla_topk"], result.settings["boundary"]) == ("sla", 0.5, 0.9)


def test_quantising_changes_little_and_saves_room(
    tmp_path: Path, files: Files, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    latent, timestep, text = torch.randn(1, 16, 2, 4, 6), torch.tensor([700.0]), torch.randn(1, 8, 64)
    video = torch.rand(1, 3, 5, 32, 48) * 2 - 1
    velocities, latents, sizes = [], [], []
    for quantize in (False, True):
        out = tmp_path / f"quantised-{quantize}"
        pack_model(out, "base", {"transformer": files[0]}, files[1], quantize=quantize)
        with torch.no_grad():
            velocities.append(load_transformer(out / "transformer.safetensors")(latent, timestep, text))
            latents.append(load_vae(out / "vae.safetensors").encode(video))
        sizes.append([(out / f"{name}.safetensors").stat().st_size for name in ("transformer", "vae")])
    assert 1e-5 < relative_error(velocities[1], velocities[0]) < 0.04
    assert 1e-5 < relative_error(latents[1], latents[0]) < 0.04
    assert all(small < 0.6 * large for small, large in zip(sizes[1], sizes[0], strict=True))


def test_packing_over_its_own_files_keeps_them(tmp_path: Path, files: Files) -> None:
    out = tmp_path / "out"
    pack_model(out, "base", {"transformer": files[0]}, files[1])
    before = {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    own = {"vae": out / "vae.safetensors", "text_encoder": out / "text_encoder.safetensors"}
    pack_model(out, "base", {"transformer": files[0]}, {**own, "tokenizer": out / "tokenizer" / "spiece.model"})
    assert {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_what_is_missing_is_named(tmp_path: Path, files: Files) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors does not exist; run its stage first"):
        pack_model(tmp_path / "out", "t2v", {"transformer": tmp_path / "gone.safetensors"}, files[1])
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="base, t2v, i2v, got 'v2v'"):
        pack_model(tmp_path / "out", "v2v", {"transformer": files[0]}, files[1])
    with pytest.raises(CheckpointError, match="needs either a transformer, or a high_noise and a low_noise expert"):
        pack_model(tmp_path / "out", "t2v", {}, files[1])
    assert not (tmp_path / "out").exists()
