"""Small random models as the official files hold them, and what they compute: the yardstick for every other layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from turbowan.checkpoints import load_text_encoder, load_transformer, load_vae
from turbowan.checkpoints.wan import write_text_encoder
from turbowan.models.image_encoder import ImageEncoder
from turbowan.models.text_encoder import TextEncoder
from turbowan.models.transformer import TransformerConfig, WanTransformer
from turbowan.models.vae import WanVAE

PROJ = "self_attn.attn_op.local_attn.proj_l"
KINDS = {
    "t2v": {},
    "i2v": {"in_dim": 36},
    "i2v-2.1": {"in_dim": 36, "image_dim": 128},
    "t2v-sla": {"has_sla": True},
    "i2v-sla": {"in_dim": 36, "has_sla": True},
}
State = dict[str, Tensor]


@pytest.fixture
def transformer_state(fresh_seed: int) -> Callable[..., State]:
    """A random transformer in TurboDiffusion's layout: bfloat16, with float32 norms and SLA projections."""

    def make(kind: str = "t2v-sla", dim: int = 256, num_layers: int = 2) -> State:
        config = TransformerConfig(dim=dim, ffn_dim=384, num_layers=num_layers, text_dim=64, **KINDS[kind])
        state = {}
        for key, value in WanTransformer(config).state_dict().items():
            if value.ndim == 1:  # no norm is left at ones and zeros
                value = value + 0.2 * torch.randn_like(value)
            wide = "proj_l" in key or ".norm" in key
            state[key.replace("self_attn.proj_l", PROJ)] = value.detach().to(torch.float32 if wide else torch.bfloat16)
        return state

    return make


@pytest.fixture
def vae_state(fresh_seed: int) -> State:
    """A random VAE of base width 16 as `Wan2.1_VAE.pth` names it."""
    return {key: value.detach().bfloat16() for key, value in WanVAE(16).state_dict().items()}


@pytest.fixture
def text_state(fresh_seed: int) -> State:
    """A random two-layer umT5 encoder of width 64 as `models_t5_umt5-xxl-enc-bf16.pth` names it."""
    state = TextEncoder(512, 64, layers=2, heads=2, head_width=64, hidden=128).model.state_dict()
    return {key: value.detach().bfloat16() for key, value in write_text_encoder(state).items()}


@pytest.fixture
def clip_state(fresh_seed: int) -> Callable[[int], State]:
    """A random two-layer CLIP tower of 28 x 28 pixels as `transformers` names it, in float32."""

    def make(width: int = 128) -> State:
        sizes = {"hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 2, "hidden_act": "gelu"}
        config = CLIPVisionConfig(**sizes, num_attention_heads=width // 64, image_size=28, patch_size=14)
        state = ImageEncoder(config).model.state_dict()
        prefix = "" if any(key.startswith("vision_model.") for key in state) else "vision_model."
        return {prefix + key: value + 0.1 * torch.randn_like(value) for key, value in state.items()}

    return make


@pytest.fixture
def spiece() -> Path:
    """A SentencePiece model of 512 pieces."""
    import turbowan

    return Path(turbowan.__file__).parent / "assets" / "tiny" / "tokenizer" / "spiece.model"


@pytest.fixture
def velocity() -> Callable[..., Tensor]:
    """What a transformer's file computes for fixed inputs, in float32."""

    def run(path: Path, text_rows: int = 8, **options: object) -> Tensor:
        net = load_transformer(path, **options)
        draw = torch.Generator().manual_seed(1)
        latent = torch.randn(1, 16, 3, 16, 16, generator=draw)
        text = torch.randn(1, text_rows, net.config.text_dim, generator=draw)
        channels = net.condition_channels
        condition = torch.randn(1, channels, 3, 16, 16, generator=draw) if channels else None
        image = torch.randn(1, 5, net.config.image_dim, generator=draw) if net.config.image_dim else None
        with torch.inference_mode():
            return net(latent, torch.tensor([620.0]), text, condition, image)

    return run


@pytest.fixture
def decoded() -> Callable[[Path], Tensor]:
    """What a VAE's file decodes and encodes, in float32, end to end."""

    def run(path: Path) -> Tensor:
        vae = load_vae(path)
        draw = torch.Generator().manual_seed(1)
        with torch.inference_mode():
            video = vae.decode(torch.randn(1, 16, 2, 4, 4, generator=draw))
            return torch.cat([video.flatten(), vae.encode(video.clamp(-1, 1)).flatten()])

    return run


@pytest.fixture
def embedded() -> Callable[..., Tensor]:
    """What a text encoder's file makes of fixed ids, in float32 or the dtype given."""

    def run(path: Path, dtype: torch.dtype = torch.float32) -> Tensor:
        encoder = load_text_encoder(path, dtype=dtype)
        ids = torch.arange(5, 25).unsqueeze(0)
        with torch.inference_mode():
            return encoder(ids, torch.ones_like(ids))

    return run
