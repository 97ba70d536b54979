"""The transformer against diffusers' WanTransformer3DModel, with the same random weights, from a diffusers folder."""

import pytest
import torch

from turbowan.checkpoints import load_transformer

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("fresh_seed")

KINDS = {
    "T2V": {},
    "I2V 2.2": {"in_channels": 36},
    "I2V 2.1": {"in_channels": 36, "image_dim": 24, "added_kv_proj_dim": 256},
}


def make_peer(**options):
    """Two layers of width 256 whose norms, biases and modulations are all random."""
    settings = {"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 2, "ffn_dim": 320, "text_dim": 48}
    peer = diffusers.WanTransformer3DModel(**{**settings, "cross_attn_norm": True, **options}).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return peer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 10, 14)])
def test_equals_diffusers(kind, grid, tmp_path, relative_error):
    options = KINDS[kind]
    peer = make_peer(**options)
    peer.save_pretrained(tmp_path / "transformer")
    net = load_transformer(tmp_path / "transformer")
    assert net.config.image_dim == options.get("image_dim")
    latent, timestep, text = torch.randn(2, 16, *grid), torch.rand(2) * 1000, torch.randn(2, 512, 48)
    condition = torch.randn(2, 20, *grid) if "in_channels" in options else None
    tokens = torch.randn(2, 257, 24) if "image_dim" in options else None
    with torch.no_grad():
        expected = peer(
            hidden_states=latent if condition is None else torch.cat([latent, condition], dim=1),
            timestep=timestep,
            encoder_hidden_states=text,
            encoder_hidden_states_image=tokens,
        ).sample
        ours = net(latent, timestep, text, condition, tokens)
    assert relative_error(ours, expected) <= 1e-5
