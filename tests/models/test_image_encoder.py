"""The CLIP tower of Wan 2.1 image-to-video: what it is given, and which layer's states it gives."""

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig

from turbowan.models.image_encoder import ImageEncoder

pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.fixture
def encoder():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return ImageEncoder(CLIPVisionConfig(**sizes, image_size=28, patch_size=14)).eval().requires_grad_(False)


def by_hand(model, image):
    """Preprocessing and every layer but the last, module by module."""
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (mean, std))
    pixels = (F.interpolate(image, (28, 28), mode="bicubic", align_corners=False) + 1) / 2
    tower = getattr(model, "vision_model", model)
    hidden = tower.pre_layrnorm(tower.embeddings((pixels - mean) / std))
    for layer in list(tower.encoder.layers)[:-1]:
        states, rest = layer.layer_norm1(hidden), hidden
        q, k, v = (p(states).unflatten(-1, (2, 16)).transpose(1, 2) for p in (
            layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj))  # fmt: skip
        mixed = ((q @ k.transpose(-1, -2) / 4).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        hidden = rest + layer.self_attn.out_proj(mixed)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return hidden


@pytest.mark.parametrize(("height", "width"), [(28, 28), (64, 96), (20, 14)])
def test_gives_the_states_before_the_last_layer(height, width, encoder, relative_error):
    image = torch.rand(2, 3, height, width) * 2 - 1
    ours = encoder(image)
    assert ours.shape == (2, 1 + (28 // 14) ** 2, 32)
    assert relative_error(ours, by_hand(encoder.model, image)) <= 1e-5
