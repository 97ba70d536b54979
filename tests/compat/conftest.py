"""A model in the official files' layout: random transformers, and the embedded VAE and text encoder as .pth."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from turbowan import specs
from turbowan.checkpoints.files import read_tensors, write_tensors
from turbowan.checkpoints.official import write_transformer
from turbowan.engine import EMBEDDED
from turbowan.models.transformer import TransformerConfig, WanTransformer

SIZES = {"16:9": (128, 96), "1:1": (64, 64)}


@dataclass(frozen=True)
class OfficialFiles:
    """dit: with SLA. plain: without. high, low: experts of 36 input channels. common: flags for the other parts."""

    dit: Path
    plain: Path
    high: Path
    low: Path
    vae: Path
    text_encoder: Path
    image: Path

    @property
    def common(self) -> list[str]:
        return ["--vae_path", str(self.vae), "--text_encoder_path", str(self.text_encoder)]

    def t2v(self, *flags: str) -> list[str]:
        """A command line of the T2V script."""
        return ["--dit_path", str(self.dit), "--prompt", "a red circle", *self.common, *flags]

    def i2v(self, *flags: str) -> list[str]:
        """A command line of the I2V script."""
        experts = ["--high_noise_model_path", str(self.high), "--low_noise_model_path", str(self.low)]
        return [*experts, "--image_path", str(self.image), "--prompt", "a red circle", *self.common, *flags]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> OfficialFiles:
    folder = tmp_path_factory.mktemp("checkpoints")
    embedded = EMBEDDED / "tiny"
    made = OfficialFiles(
        **{name: folder / f"{name}.pth" for name in ("dit", "plain", "high", "low", "vae", "text_encoder")},
        image=folder / "image.png",
    )
    text = read_tensors(embedded / "text_encoder.safetensors")
    write_tensors(made.text_encoder, text)
    write_tensors(made.vae, read_tensors(embedded / "vae.safetensors"))
    shutil.copytree(embedded / "tokenizer", folder / "tokenizer")
    width = text["token_embedding.weight"].shape[1]
    torch.manual_seed(int(np.random.default_rng().integers(2**31)))
    for path, in_dim, has_sla in (
        (made.dit, 16, True),
        (made.plain, 16, False),
        (made.high, 36, True),
        (made.low, 36, True),
    ):
        config = TransformerConfig(256, 512, num_layers=2, text_dim=width, in_dim=in_dim, has_sla=has_sla)
        state = WanTransformer(config).to(torch.bfloat16).state_dict()
        state["head.head.weight"] *= 4  # velocities of about the latent's own size, so that a wrong step shows
        write_tensors(path, write_transformer(state))
    pixels = np.random.default_rng().integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((150, 90), Image.Resampling.BICUBIC).save(made.image)
    return made


@pytest.fixture
def small_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """480p and 720p of a size that one CPU core does in a second, and no GPU, whatever the machine has."""
    for name in ("480p", "720p"):
        monkeypatch.setitem(specs.RESOLUTIONS, name, SIZES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
