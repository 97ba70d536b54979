"""Layouts of true sizes are those of the published files; small ones of every format load and stay finite."""

from dataclasses import replace

import pytest
import torch

from turbowan.bench.presets import PRESETS, find_preset, frame_size, write_model
from turbowan.bench.random_weights import TEXT_ENCODERS, TRANSFORMERS, text_layout, transformer_layout, vae_layout
from turbowan.bench.text import random_encoder
from turbowan.checkpoints.detect import detect
from turbowan.checkpoints.load import load_text_encoder, load_transformer, load_vae
from turbowan.errors import MachineError, RequestError
from turbowan.request import GenerateRequest


def gigabytes(layout):
    return sum(value.nbytes for value in layout.values()) / 1e9


@pytest.mark.parametrize(
    ("size", "format", "family", "quantization", "size_gb"),
    [
        ("1.3B", "bf16", "turbowan", "none", 2.84),
        ("14B", "int8_block", "turbowan", "int8_block", 14.6),
        ("14B", "int8_row", "lightx2v", "int8_row", 14.6),
        ("14B", "fp8", "comfy", "fp8", 14.6),
    ],
)
def test_true_sizes(size, format, family, quantization, size_gb):
    config = replace(TRANSFORMERS[size], in_dim=36)
    layout = transformer_layout(config, format)
    found = detect(layout)
    assert found.role == "transformer"
    assert found.quantization == quantization
    assert found.family in (family, "official", "wan")
    assert gigabytes(layout) == pytest.approx(size_gb, rel=0.03)


def test_true_sizes_of_the_others():
    assert gigabytes(vae_layout(96)) == pytest.approx(0.5076, rel=1e-3)  # Wan2.1_VAE.pth
    assert gigabytes(text_layout(TEXT_ENCODERS["xxl"], "bf16")) == pytest.approx(11.36, rel=1e-3)
    assert gigabytes(text_layout(TEXT_ENCODERS["xxl"], "fp8")) == pytest.approx(6.73, rel=1e-2)


@pytest.mark.parametrize("format", ["bf16", "int8_block", "int8_row", "fp8"])
def test_every_format_runs(format, tmp_path):
    preset = replace(PRESETS["tiny-I2V"], format=format)
    manifest, _ = write_model(tmp_path, preset, "fp8" if format == "fp8" else "bf16", layers=1)
    net = load_transformer(manifest.files["high_noise"])
    out = net(torch.randn(1, 16, 2, 4, 6), torch.tensor([600.0]), torch.randn(1, 8, 256), torch.randn(1, 20, 2, 4, 6))
    encoder = load_text_encoder(manifest.files["text_encoder"])
    text = encoder(torch.randint(2, 500, (1, 9)), torch.ones(1, 9, dtype=torch.int64))
    frames = load_vae(manifest.files["vae"]).decode(torch.randn(1, 16, 1, 4, 4))
    for value in (out, text, frames):
        assert value.isfinite().all()
        assert value.std() > 0
    experts = [load_transformer(manifest.files[role]).patch_embedding.weight for role in ("high_noise", "low_noise")]
    assert not torch.equal(*experts)


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_an_encoder_of_random_weights(format):
    encoder = random_encoder(TEXT_ENCODERS["tiny"], format, torch.device("cpu"))
    with torch.inference_mode():
        assert encoder(torch.randint(2, 500, (1, 9))).isfinite().all()
    kept = {weight.dtype for weight in (*encoder.parameters(), *encoder.buffers()) if weight.ndim == 2}
    assert (torch.float8_e4m3fn in kept) == (format == "fp8")


def test_what_is_there_is_not_written_again(tmp_path):
    preset = PRESETS["tiny"]
    first, _ = write_model(tmp_path, preset)
    times = {path: path.stat().st_mtime_ns for path in first.files.values() if path.is_file()}
    write_model(tmp_path, preset)
    write_model(tmp_path, replace(preset, format="fp8"))  # shares VAE and text encoder
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match=r"preset must be one of 1.3B-480p, .*, got '2B'"):
        find_preset("2B", None, "bf16")
    with pytest.raises(RequestError, match=r"format must be one of bf16, int8_block, int8_row, fp8, got 'int4'"):
        find_preset("tiny", "int4", "bf16")
    monkeypatch.setattr("turbowan.bench.presets.free_disk", lambda _: 10**9)
    with pytest.raises(MachineError, match=r"needs 40\.9 GB in .*, which has 1.0 GB free"):
        write_model(tmp_path, PRESETS["A14B-I2V-720p"])


def test_frame_sizes():
    assert frame_size(GenerateRequest(prompt="-", resolution="720p")) == (1280, 720)
    assert frame_size(GenerateRequest(prompt="-", width=64, height=48)) == (64, 48)
