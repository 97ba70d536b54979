"""Files of `diffusers`: `transformer`, `vae` and `text_encoder` folders with names of their own and a `config.json`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..models.text_encoder import EPS as TEXT_EPS
from ..models.text_encoder import TextEncoder
from ..models.transformer import EPS, HEAD_SIZE, WanTransformer
from ..models.transformer import PATCH as PATCH_SIZE
from ..models.vae import LATENT_CHANNELS, LATENT_MEAN, LATENT_STD, MULTIPLIERS, WanVAE
from .files import State
from .names import DIFFUSERS_TRANSFORMER, DIFFUSERS_VAE, rename
from .wan import PATCH

# the file name that `from_pretrained` looks for, by role
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def read_transformer(state: State) -> State:
    state = {key.replace(".attn1.attn_impl.", ".attn1.attn_op.local_attn."): value for key, value in state.items()}
    state = rename(state, DIFFUSERS_TRANSFORMER)
    if PATCH in state and state[PATCH].ndim == 5:
        state[PATCH] = state[PATCH].flatten(1)
    return state


def write_transformer(state: State) -> State:
    state = rename(state, DIFFUSERS_TRANSFORMER, to_theirs=True)
    return {**state, PATCH: state[PATCH].unflatten(1, (-1, *PATCH_SIZE))}


def transformer_config(net: WanTransformer) -> dict[str, Any]:
    """What `WanTransformer3DModel.from_pretrained` reads from `config.json`."""
    sizes = net.config
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(PATCH_SIZE),
        "num_attention_heads": sizes.num_heads,
        "attention_head_dim": HEAD_SIZE,
        "in_channels": sizes.in_dim,
        "out_channels": sizes.out_dim,
        "text_dim": sizes.text_dim,
        "freq_dim": sizes.freq_dim,
        "ffn_dim": sizes.ffn_dim,
        "num_layers": sizes.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": EPS,
        "image_dim": sizes.image_dim,
        "added_kv_proj_dim": None if sizes.image_dim is None else sizes.dim,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


def read_vae(state: State) -> State:
    return rename(state, DIFFUSERS_VAE)


def write_vae(state: State) -> State:
    return rename(state, DIFFUSERS_VAE, to_theirs=True)


def vae_config(vae: WanVAE) -> dict[str, Any]:
    """What `AutoencoderKLWan.from_pretrained` reads from `config.json`."""
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": vae.dim,
        "z_dim": LATENT_CHANNELS,
        "dim_mult": list(MULTIPLIERS),
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
        "latents_mean": list(LATENT_MEAN),
        "latents_std": list(LATENT_STD),
    }


def read_text_encoder(state: State) -> State:
    """`transformers` ties the input embedding: files hold it under one name or both."""
    state = dict(state)
    embedding = state.pop("encoder.embed_tokens.weight", None)
    if embedding is not None:
        state.setdefault("shared.weight", embedding)
    return state


def text_encoder_config(encoder: TextEncoder) -> dict[str, Any]:
    """What `UMT5EncoderModel.from_pretrained` reads from `config.json`."""
    from transformers import UMT5Config

    sizes = encoder.sizes
    config = UMT5Config(
        vocab_size=sizes.vocabulary,
        d_model=sizes.width,
        d_kv=sizes.head_width,
        d_ff=sizes.hidden,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        layer_norm_epsilon=TEXT_EPS,
    )
    return {**config.to_diff_dict(), "architectures": ["UMT5EncoderModel"]}


CONFIGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "transformer": transformer_config,
    "vae": vae_config,
    "text_encoder": text_encoder_config,
}
