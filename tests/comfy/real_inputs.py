"""What the cases in a real ComfyUI put in: seeds, a start picture, files of small models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from real_server import REPOSITORY, Server
from safetensors.torch import save_file

from turbowan.checkpoints import load_transformer
from turbowan.models.pack import round_linears

ASSETS = REPOSITORY / "turbowan" / "assets"
# the embedded transformers by what our loaders call them
EMBEDDED = {
    "tiny": ASSETS / "tiny" / "transformer.safetensors",
    "tiny-i2v-high": ASSETS / "tiny-i2v" / "high_noise.safetensors",
    "tiny-i2v-low": ASSETS / "tiny-i2v" / "low_noise.safetensors",
}
SEEDS = torch.Generator()


def fresh_seed() -> int:
    return int(torch.randint(1 << 31, (), generator=SEEDS))


def start_picture(server: Server, width: int = 128, height: int = 96) -> np.ndarray:
    """A red disc on blue in the input folder, as start.png."""
    y, x = np.mgrid[:height, :width]
    disc = (x - width / 3) ** 2 + (y - height / 2) ** 2 < (height / 5) ** 2
    picture = np.where(disc[..., None], (220, 30, 30), (30, 40, 220)).astype(np.uint8)
    Image.fromarray(picture).save(server.base / "input" / "start.png")
    return picture


def expanded(server: Server, name: str) -> Path:
    """An embedded 8-bit transformer as a file in floats, among the diffusion models: NAME-floats.safetensors."""
    path = server.models("diffusion_models") / f"{name}-floats.safetensors"
    if not path.exists():
        net = load_transformer(EMBEDDED[name])
        round_linears(net, "bf16")
        save_file(net.state_dict(), path)
    return path
