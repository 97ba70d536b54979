"""The VAE stage at tiny sizes: it starts as a per-frame autoencoder, trains, resumes, and normalises its latents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from turbowan.checkpoints import load_vae
from turbowan.checkpoints.files import write_tensors
from turbowan.models.vae import CausalConv3d, Clip, FrameAttention, Residual, WanVAE
from turbowan.train.curve import CURVE_FILE
from turbowan.train.loop import STATE_FILE, clip_and_step
from turbowan.train.vae import (
    Phase,
    VAEConfig,
    draw_clips,
    fold_statistics,
    initialise,
    loss_terms,
    statistics_clips,
    train_vae,
)
from turbowan.world.scenes import draw_scenes, render

CPU = torch.device("cpu")
PHASES = (Phase(0.5, 1, 32, 32, 4), Phase(1.0, 5, 24, 40, 2))
CONFIG = VAEConfig(minutes=8 / 60, phases=PHASES, dim=8, frames=9, height=48, width=64, lr=3e-3)


def started_vae(seed: int, dim: int = 8) -> WanVAE:
    torch.manual_seed(seed)
    vae = WanVAE(dim)
    initialise(vae)
    return vae.eval()


def test_it_starts_as_a_per_frame_autoencoder(fresh_seed: int) -> None:
    """Convolutions see the current frame only, residual branches and attention add nothing."""
    vae = started_vae(fresh_seed)
    seen = {CausalConv3d: 0, Residual: 0, FrameAttention: 0}
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, CausalConv3d):
                x = torch.randn(1, module.in_channels, 5, 6, 6)
                alone = torch.cat([module(frame, Clip()) for frame in x.split(1, dim=2)], dim=2)
                assert torch.allclose(module(x, Clip()), alone, atol=1e-4)
            elif isinstance(module, Residual):
                last = module.residual["6"]
                assert not last.weight.any()  # type: ignore[operator]
                assert not last.bias.any()  # type: ignore[operator]
            elif isinstance(module, FrameAttention):
                x = torch.randn(1, module.proj.in_channels, 3, 4, 4)
                assert torch.allclose(module(x, Clip()), x + module.proj.bias.view(1, -1, 1, 1, 1), atol=1e-6)
            if type(module) in seen:
                seen[type(module)] += 1
    assert all(seen.values())


@pytest.mark.usefixtures("clock")
def test_training_resumes(tmp_path: Path, fresh_seed: int) -> None:
    config = replace(CONFIG, seed=fresh_seed % 1000, minutes=20 / 60)
    before = WanVAE(8).state_dict()
    vae = train_vae(config, tmp_path, CPU, max_minutes=10 / 60)
    state = torch.load(tmp_path / STATE_FILE, weights_only=True)
    assert state["step"] == 9  # ten seconds by the test's clock
    average = dict(zip((name for name, _ in vae.named_parameters()), state["average"], strict=True))
    for name, value in vae.named_parameters():
        assert torch.equal(value, average[name])  # the averaged weights come back, the raw ones stay in the state
        assert value.shape == before[name].shape
    train_vae(config, tmp_path, CPU)
    lines = [json.loads(line) for line in (tmp_path / CURVE_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 19))
    assert [line["frames"] for line in lines] == [1] * 9 + [5] * 9
    assert {"l1", "mse", "edge", "kl", "psnr", "norm", "minutes"} <= set(lines[0])
    assert all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in lines)
    done = train_vae(config, tmp_path, CPU)  # a stage that is done only loads its result
    assert len((tmp_path / CURVE_FILE).read_text().splitlines()) == 18
    assert all(torch.isfinite(p).all() for p in done.parameters())


def test_the_loss_falls(fresh_seed: int) -> None:
    """On four pictures, in thirty steps: the mean of four draws, since some are hard to leave the mean of."""
    fallen = []
    for seed in range(fresh_seed, fresh_seed + 4):
        vae = started_vae(seed).train()
        clips = draw_clips(CONFIG, Phase(1.0, 1, 24, 24, 4), torch.Generator().manual_seed(seed), CPU)
        optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99))
        losses = []
        for _ in range(30):
            terms = loss_terms(vae, clips)
            (terms["l1"] + terms["mse"] + 0.5 * terms["edge"] + 1e-4 * terms["kl"]).backward()
            clip_and_step([optimizer], list(vae.parameters()), 1e-3, 1.0)
            losses.append(terms["l1"].item())
        fallen.append(min(losses[-10:]) / losses[0])
    assert sum(fallen) / 4 < 0.9  # 0.59 on average; of 220 single draws 1.02 at most


def test_clips_are_windows_of_the_world(fresh_seed: int) -> None:
    for phase in PHASES:
        config = replace(CONFIG, collage_share=0.5)
        first, again = (draw_clips(config, phase, torch.Generator().manual_seed(fresh_seed), CPU) for _ in range(2))
        assert first.shape == (phase.batch, 3, phase.frames, phase.height, phase.width)
        assert first.abs().max() <= 1
        assert torch.equal(first, again)
        other = draw_clips(config, phase, torch.Generator().manual_seed(fresh_seed + 1), CPU)
        assert not torch.equal(first, other)


def test_loss_terms_are_those_of_the_reconstruction(fresh_seed: int) -> None:
    """With next to no variance the sampled latent is the mean, so that encode and decode give the same error."""
    vae = started_vae(fresh_seed)
    with torch.no_grad():
        vae.conv1.weight[16:] = 0
        vae.conv1.bias[16:] = -19.0  # type: ignore[index]
    clips = draw_clips(CONFIG, PHASES[1], torch.Generator().manual_seed(fresh_seed), CPU)
    with torch.no_grad():
        terms = loss_terms(vae, clips)
        out = vae.decode(vae.encode(clips))
    error = out - clips
    assert terms["mse"] == pytest.approx(error.square().mean().item(), rel=1e-2)
    assert terms["l1"] == pytest.approx((error.abs().mean() + 0.1 * error[:, :, 0].abs().mean()).item(), rel=1e-2)
    assert terms["kl"] > 0.5 * (19 - 1)
    assert terms["edge"] > 0


@pytest.mark.parametrize("kind", ["started", "embedded"])
def test_fold_statistics(tmp_path: Path, tiny: Path, fresh_seed: int, kind: str) -> None:
    """Wan's own mean and deviation normalise the latents afterwards, and a decoded video is the same as before."""
    vae = started_vae(fresh_seed) if kind == "started" else load_vae(tiny / "vae.safetensors", CPU, torch.float32)
    with torch.no_grad():  # latents far from mean 0 and deviation 1
        vae.conv1.bias[:16] += 3 * torch.randn(16)  # type: ignore[index]
        vae.conv1.weight[:16] *= torch.rand(16, 1, 1, 1, 1) * 3 + 0.2
    generator = torch.Generator().manual_seed(fresh_seed)
    clips = [render(draw_scenes(32, generator, 0.15), 1, 48, 64) for _ in range(3)]
    unseen = render(draw_scenes(64, generator, 0.15, held_out=None), 1, 48, 64)
    other = render(draw_scenes(2, generator, 0.15, held_out=None), 9, 48, 64)
    with torch.no_grad():
        before = vae.decode(vae.encode(other))
        fold_statistics(vae, clips)
        latents = torch.cat([vae.encode(batch) for batch in clips]).transpose(0, 1).flatten(1)
        held_out = vae.encode(unseen).transpose(0, 1).flatten(1)
        after = vae.decode(vae.encode(other))
    assert latents.mean(dim=1).abs().max() < 1e-3
    assert (latents.std(dim=1) - 1).abs().max() < 1e-3
    assert held_out.mean(dim=1).abs().mean() < 0.3
    assert (held_out.std(dim=1) - 1).abs().mean() < 0.3
    assert (after - before).abs().max() < 2e-3 * before.abs().max()
    write_tensors(tmp_path / "vae.safetensors", vae.state_dict())
    loaded = load_vae(tmp_path / "vae.safetensors", CPU, torch.float32)
    with torch.no_grad():
        assert torch.allclose(loaded.encode(other), vae.encode(other), atol=1e-5)


def test_fold_statistics_keeps_the_variance_in_step(fresh_seed: int) -> None:
    """The predicted deviation of a sampled latent scales as its mean does."""
    vae = started_vae(fresh_seed)
    clips = [render(draw_scenes(4, torch.Generator().manual_seed(fresh_seed)), 1, 32, 48)]

    def moments() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            mean, log_variance = vae.conv1(vae.encoder(clips[0], Clip()), Clip()).chunk(2, dim=1)
        return mean.transpose(0, 1).flatten(1), (0.5 * log_variance).exp().transpose(0, 1).flatten(1)

    mean, std = moments()
    ratio = std.mean(dim=1) / mean.std(dim=1)
    fold_statistics(vae, clips)
    mean, std = moments()
    assert torch.allclose(std.mean(dim=1) / mean.std(dim=1), ratio, rtol=1e-3)


def test_statistics_are_taken_on_whole_training_clips() -> None:
    clips = statistics_clips(CONFIG, CPU, batches=3, batch=4)
    assert [tuple(c.shape) for c in clips] == [(4, 3, 9, 48, 64)] * 3
    again = statistics_clips(CONFIG, CPU, batches=3, batch=4)
    assert all(torch.equal(a, b) for a, b in zip(clips, again, strict=True))
