"""Official int8 blocks, against the official tool's own file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbowan.checkpoints.files import read_tensors
from turbowan.checkpoints.quantize import quantize_checkpoint, quantize_transformer
from turbowan.errors import CheckpointError

State = dict[str, Tensor]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_as_the_official_tool(suffix: str, tmp_path: Path, golden: Callable[[str], Path]) -> None:
    out = tmp_path / f"quant{suffix}"
    quantize_checkpoint(golden("t2v-tiny.pth"), out)
    ours, theirs = read_tensors(out), read_tensors(golden("t2v-tiny-quant.pth"))
    assert set(ours) == set(theirs)
    codes = differing = 0
    for key, value in theirs.items():
        assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype), key
        if key.endswith(".int8_weight"):
            distance = (ours[key].int() - value.int()).abs()
            assert distance.max() <= 1, key  # the official kernel divides approximately: ties may fall either way
            codes, differing = codes + value.numel(), differing + int((distance > 0).sum())
        else:
            assert torch.equal(ours[key], value), key
    assert codes > 500_000
    assert differing <= 0.001 * codes


@pytest.mark.parametrize("source", ["official.pth", "wan.pth", "comfy.safetensors", "diffusers"])
def test_every_family_gives_the_same_file(
    source: str, tmp_path: Path, transformer_state: Callable[..., State]
) -> None:
    from turbowan.checkpoints.convert import convert_checkpoint

    state = transformer_state("i2v-sla")
    torch.save(state, tmp_path / "official.pth")
    if source != "official.pth":
        to = source.split(".")[0]
        convert_checkpoint(tmp_path / "official.pth", tmp_path / source, to)
    quantize_checkpoint(tmp_path / source, tmp_path / "quant.safetensors")
    ours, expected = read_tensors(tmp_path / "quant.safetensors"), quantize_transformer(state)
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    assert sum(value.dtype == torch.int8 for value in ours.values()) == 20


def test_codes_stand_for_the_weights(transformer_state: Callable[..., State]) -> None:
    """Each code times its block's scale is within half a step of the weight; the largest may be a whole step short."""
    state = transformer_state("t2v-sla")
    quantized = quantize_transformer(state)
    weight, layer = state["blocks.0.ffn.0.weight"].float(), "blocks.0.ffn.0"
    scale = quantized[f"{layer}.scale"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    error = (quantized[f"{layer}.int8_weight"].float() * scale - weight).abs()
    saturated = weight >= 127.5 * scale
    assert (error[~saturated] <= 0.5001 * scale[~saturated]).all()
    assert (error <= 1.0001 * scale).all()


def test_progress_counts_up_to_the_total(tmp_path: Path, transformer_state: Callable[..., State]) -> None:
    torch.save(transformer_state("t2v"), tmp_path / "in.pth")
    seen: list[tuple[int, int]] = []
    quantize_checkpoint(tmp_path / "in.pth", tmp_path / "out.safetensors", "cpu", lambda *at: seen.append(at))
    total = len(read_tensors(tmp_path / "out.safetensors"))
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_what_is_refused(tmp_path: Path, transformer_state: Callable[..., State], vae_state: State) -> None:
    plain = transformer_state("t2v")
    key = "blocks.1.cross_attn.k.weight"
    torch.save(quantize_transformer(plain), tmp_path / "blocks.pth")
    torch.save({**plain, key: plain[key].to(torch.float8_e4m3fn)}, tmp_path / "fp8.pth")
    rows = {key: torch.ones(256, 256, dtype=torch.int8), f"{key}_scale": torch.ones(256, 1)}
    torch.save({**plain, **rows}, tmp_path / "rows.pth")
    torch.save(vae_state, tmp_path / "vae.pth")
    torch.save({k: v for k, v in plain.items() if k != key}, tmp_path / "short.pth")
    torch.save(plain, tmp_path / "plain.pth")
    refused = {
        ("blocks.pth", "out.pth"): r"blocks\.pth is .*int8_block.*in 8 bits already.*full-precision",
        ("fp8.pth", "out.pth"): r"fp8\.pth is .*fp8.*in 8 bits already",
        ("rows.pth", "out.pth"): r"rows\.pth is .*int8_row.*in 8 bits already",
        ("vae.pth", "out.pth"): r"vae\.pth is a Wan VAE.*diffusion transformer is wanted",
        ("short.pth", "out.pth"): r"short\.pth.*missing.*cross_attn\.k\.weight",
        ("plain.pth", "out.bin.gz"): "weights end in one of",
        ("plain.pth", "plain.pth"): "is the input itself",
    }
    before = sorted(os.listdir(tmp_path))
    for (source, target), message in refused.items():
        with pytest.raises(CheckpointError, match=message) as error:
            quantize_checkpoint(tmp_path / source, tmp_path / target)
        assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before
