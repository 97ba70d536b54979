"""Flow matching at a size a CPU trains in seconds: the loss falls, a stage goes on, the files load."""

from __future__ import annotations

import pytest
import torch

from turbowan.checkpoints import load_text_encoder, load_transformer, load_vae
from turbowan.checkpoints.tokenizer import find_tokenizer
from turbowan.engine import EMBEDDED
from turbowan.errors import CheckpointError
from turbowan.models.tokenizer import TEXT_LENGTH
from turbowan.train.flow import FlowConfig, FlowModel, draw_times, export, make_optimizers, preview, train_flow
from turbowan.train.tokenizer import VOCABULARY
from turbowan.train.world import Pool

TINY = EMBEDDED / "tiny"
CPU = torch.device("cpu")
SMALL = {
    "dim": 128, "ffn_dim": 128, "layers": 1, "text_dim": 64, "text_layers": 1, "frames": 5, "height": 32, "width": 48,
    "batch": 4, "pool_start": 8, "pool_size": 16, "refresh_clips": 8, "refresh_steps": 50, "wordings": 2,
    "shifted_share": 0.5, "preview_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    return load_vae(TINY / "vae.safetensors"), find_tokenizer(TINY / "text_encoder.safetensors", TINY / "tokenizer")


def test_training_lowers_the_loss_and_goes_on(tmp_path, parts, clock):
    config = FlowConfig(minutes=80 / 60, order_bias=True, lr=3e-3, **SMALL)
    train_flow(config, tmp_path, *parts, VOCABULARY, CPU, max_minutes=40 / 60)
    steps = torch.load(tmp_path / "state.pt", weights_only=True)["step"]
    model = train_flow(config, tmp_path, *parts, VOCABULARY, CPU)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] > steps > 0
    torch.manual_seed(0)
    idle = held_out_loss(FlowModel(config, VOCABULARY), config, parts)
    assert held_out_loss(model, config, parts) < 0.8 * idle
    shares = preview(model, config, *parts, 2, CPU, tmp_path / "samples.png")
    assert set(shares) == {"colour", "shape", "direction", "background", "all"}
    assert (tmp_path / "samples.png").stat().st_size > 0


def held_out_loss(model: FlowModel, config: FlowConfig, parts) -> float:
    pool = Pool(config, *parts, CPU, seed=10**6)
    pool.add(8)
    generator = torch.Generator().manual_seed(3)
    latent, ids, _ = pool.rows(*torch.rand(3, config.batch, generator=generator))
    noise = torch.randn(latent.shape, generator=generator)
    t = torch.full((config.batch,), 0.7)
    with torch.no_grad():
        velocity = model(0.3 * latent + 0.7 * noise, 1000 * t, ids)
    return float((velocity - (noise - latent)).square().mean())


def test_what_is_exported_computes_the_same(tmp_path):
    """In bfloat16 files and in the engine's way: the network as trained and the one loaded agree."""
    config = FlowConfig(minutes=1, **SMALL)
    torch.manual_seed(1)
    model = FlowModel(config, VOCABULARY).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.add(0.02 * torch.randn_like(parameter)).bfloat16().float()
    export(model, tmp_path)
    net = load_transformer(tmp_path / "transformer.safetensors")
    encoder = load_text_encoder(tmp_path / "text_encoder.safetensors")
    ids = torch.tensor([[5, 9, 77, 1] + [0] * 28, [12, 1] + [0] * 30])
    latent, timestep = torch.randn(2, 16, 2, 4, 6), torch.tensor([300.0, 950.0])
    with torch.no_grad():
        ours = model(latent, timestep, ids)
        theirs = net(latent, timestep, encoder(ids, (ids != 0).long()), text_rows=TEXT_LENGTH)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_image_to_video_goes_on_from_text_to_video(tmp_path, parts, clock, fresh_seed):
    """It starts as the other's function, whatever the condition, and learns with the text encoder as it is."""
    text = FlowModel(FlowConfig(minutes=1, **SMALL), VOCABULARY)
    torch.nn.init.normal_(text.transformer.head.head.weight, std=0.1)
    export(text, tmp_path)
    init = tmp_path / "transformer.safetensors", tmp_path / "text_encoder.safetensors"
    config = FlowConfig(minutes=5 / 60, image=True, text_lr=0.0, first_frame_weight=2.0, **SMALL)
    start = FlowModel(config, VOCABULARY)
    start.start_from(*init)
    text.start_from(*init)  # rounded to bfloat16, too
    given = torch.randn(2, 16, 2, 4, 6), torch.tensor([300.0, 950.0]), torch.tensor([[5, 9, 77, 1, 0]] * 2)
    with torch.no_grad():
        assert torch.allclose(start(*given, torch.randn(2, 20, 2, 4, 6)), text(*given), atol=1e-5)
    trained = train_flow(config, tmp_path / "run", *parts, VOCABULARY, CPU, init=init)
    for name, value in trained.text_encoder.state_dict().items():
        assert torch.equal(value, start.text_encoder.state_dict()[name]), name
    assert trained.transformer.patch_embedding.weight[:, 64:].any()


def test_files_that_do_not_fit_are_one_line(tmp_path):
    export(FlowModel(FlowConfig(minutes=1, **SMALL), VOCABULARY), tmp_path)
    wide = FlowModel(FlowConfig(minutes=1, **{**SMALL, "ffn_dim": 256}), VOCABULARY)
    with pytest.raises(CheckpointError, match=r"transformer.safetensors does not fit the configuration") as error:
        wide.start_from(tmp_path / "transformer.safetensors", tmp_path / "text_encoder.safetensors")
    assert "\n" not in str(error.value)


def test_shifted_times_are_high():
    config = FlowConfig(minutes=1, batch=4000, shifted_share=1.0, time_shift=10.0)
    times = draw_times(config, torch.Generator().manual_seed(0))
    assert float(times.median()) == pytest.approx(10 / 11, abs=0.01)
    assert 0 <= float(times.min()) <= float(times.max()) <= 1
    plain = draw_times(FlowConfig(minutes=1, batch=4000), torch.Generator().manual_seed(0))
    assert float(plain.median()) == pytest.approx(float(torch.sigmoid(torch.tensor(0.6))), abs=0.02)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_every_parameter_has_one_optimizer():
    config = FlowConfig(minutes=1, optimizer="muon", **SMALL)
    model = FlowModel(config, VOCABULARY)
    optimizers = make_optimizers(model, config, fused=False)
    held = [id(p) for o in optimizers.values() for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert all(p.ndim == 2 for group in optimizers["muon"].param_groups for p in group["params"])
