"""`turbowan quantize`, as a user runs it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import turbowan
from turbowan.checkpoints import load_transformer
from turbowan.models.linear import Int8BlockLinear
from turbowan.models.transformer import TransformerConfig, WanTransformer


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_the_size(
    suffix: str, command_line: Callable[..., tuple[int, str, str]], tmp_path: Path, fresh_seed: int
) -> None:
    config = TransformerConfig(dim=256, ffn_dim=512, num_layers=2, text_dim=64, has_sla=True)
    state = {key: value.bfloat16() for key, value in WanTransformer(config).state_dict().items()}
    torch.save(state, tmp_path / "plain.pth")
    out = tmp_path / f"quant{suffix}"
    assert command_line("quantize", tmp_path / "plain.pth", out) == (0, f"{out}\n", "")
    blocks = sum(value.nbytes for key, value in state.items() if key.startswith("blocks.") and value.ndim == 2)
    saved = (tmp_path / "plain.pth").stat().st_size - out.stat().st_size
    assert 0.4 * blocks < saved < 0.55 * blocks
    assert sum(isinstance(module, Int8BlockLinear) for module in load_transformer(out).modules()) == 20


def test_quantised_files_are_refused(command_line: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    tiny = Path(turbowan.__file__).parent / "assets" / "tiny"
    code, out, err = command_line("quantize", tiny / "transformer.safetensors", tmp_path / "out.pth")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "int8_block): it is in 8 bits already; quantise the full-precision file" in err
    code, out, err = command_line("quantize", tiny / "vae.safetensors", tmp_path / "out.pth")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is a Wan VAE (wan layout, int8_row); a diffusion transformer is wanted here" in err
    assert os.listdir(tmp_path) == []
