"""Small networks with random weights that are far from idle: every parameter shows in the result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from turbowan.models.transformer import AttentionConfig, TransformerConfig, WanTransformer
from turbowan.models.vae import WanVAE


def stir(net: nn.Module) -> nn.Module:
    """Random norms and biases in place of ones and zeros, so that none can be left out unnoticed."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim == 1 or "gamma" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return net.requires_grad_(False).eval()


@pytest.fixture
def make_transformer(fresh_seed) -> Callable[..., WanTransformer]:
    """A two-layer transformer of width 256; keywords go to its TransformerConfig, `attention` to itself."""

    def make(attention: AttentionConfig | None = None, norms: str = "exact", **sizes: object) -> WanTransformer:
        config = {"dim": 256, "ffn_dim": 320, "num_layers": 2, "text_dim": 48, "has_sla": True, **sizes}
        return stir(WanTransformer(TransformerConfig(**config), attention, norms))

    return make


@pytest.fixture
def make_vae(fresh_seed) -> Callable[[int], WanVAE]:
    """A VAE of the given base width."""

    def make(dim: int = 4) -> WanVAE:
        return stir(WanVAE(dim))

    return make
