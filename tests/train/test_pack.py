"""From the stages' files to a model folder that generates."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from turbowan import Engine, GenerateRequest
from turbowan.checkpoints import load_transformer
from turbowan.checkpoints.files import read_tensors
from turbowan.checkpoints.manifest import read_manifest
from turbowan.train.flow import FlowConfig, FlowModel, export
from turbowan.train.pack import pack_model
from turbowan.train.tokenizer import VOCABULARY

REQUEST = GenerateRequest(prompt="a red circle", width=48, height=32, num_frames=5, num_steps=10, seed=3)


@pytest.fixture
def flow(tmp_path: Path, fresh_seed: int) -> Path:
    """A flow stage's folder: an untrained model whose weights all count."""
    model = FlowModel(FlowConfig(minutes=1, dim=256, ffn_dim=256, layers=1, text_dim=64, text_layers=1), VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    export(model, tmp_path / "flow")
    return tmp_path / "flow"


@pytest.mark.parametrize("quantize", [False, True])
def test_a_packed_model_generates(tmp_path: Path, tiny: Path, flow: Path, quantize: bool) -> None:
    vae, tokenizer = tiny / "vae.safetensors", tiny / "tokenizer" / "spiece.model"
    manifest = pack_model(tmp_path / "out", "mine", flow, vae, tokenizer, quantize)
    assert manifest == tmp_path / "out" / "turbowan.toml"
    assert read_manifest(manifest).name == "mine"
    state = read_tensors(tmp_path / "out" / "transformer.safetensors")
    assert any(value.dtype == torch.int8 for value in state.values()) == quantize
    assert (tmp_path / "out" / "vae.safetensors").read_bytes() == vae.read_bytes()
    assert (tmp_path / "out" / "tokenizer" / "spiece.model").read_bytes() == tokenizer.read_bytes()
    shutil.rmtree(flow)  # the folder stands alone
    video = Engine.load(tmp_path / "out", device="cpu").generate(REQUEST).frames
    assert video.shape == (5, 32, 48, 3)
    assert video.dtype == np.uint8
    assert video.std() > 0


def test_quantising_changes_little_and_saves_room(
    tmp_path: Path, tiny: Path, flow: Path, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    latent, timestep, text = torch.randn(1, 16, 2, 4, 6), torch.tensor([700.0]), torch.randn(1, 8, 64)
    velocities, sizes = [], []
    for quantize in (False, True):
        out = tmp_path / f"quantised-{quantize}"
        pack_model(out, "mine", flow, tiny / "vae.safetensors", tiny / "tokenizer" / "spiece.model", quantize)
        net = load_transformer(out / "transformer.safetensors")
        with torch.no_grad():
            velocities.append(net(latent, timestep, text))
        sizes.append((out / "transformer.safetensors").stat().st_size)
    assert 1e-5 < relative_error(velocities[1], velocities[0]) < 0.03
    assert sizes[1] < 0.8 * sizes[0]  # embeddings and modulations stay


def test_packing_over_its_own_files_keeps_them(tmp_path: Path, tiny: Path, flow: Path) -> None:
    out = tmp_path / "out"
    arguments = (flow, tiny / "vae.safetensors", tiny / "tokenizer" / "spiece.model")
    pack_model(out, "mine", *arguments)
    before = {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    pack_model(out, "mine", flow, out / "vae.safetensors", out / "tokenizer" / "spiece.model")
    assert {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
