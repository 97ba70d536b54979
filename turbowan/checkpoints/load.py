"""From a file to a module: detect, rename, size from the tensors, assign. Nothing is allocated twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.linear import Fp8Linear, Int8BlockLinear, Int8RowLinear
from ..models.transformer import (
    HEAD_SIZE,
    AttentionConfig,
    TransformerConfig,
    WanTransformer,
)
from ..models.vae import LATENT_CHANNELS, MULTIPLIERS, WanVAE
from ..ops.layer_norm import VARIANCES
from .comfy import SPIECE
from .detect import FP8, ROLES, Detected, detect
from .families import READERS
from .files import State, read_tensors

if TYPE_CHECKING:
    from ..models.image_encoder import ImageEncoder
    from ..models.text_encoder import TextEncoder

# These compute in float32 whatever the model's dtype, so a file's float32 is kept for them.
_FLOAT32_PARTS = ("time_embedding.", "time_projection.", "head.", "modulation", "norm")
_SCALES = (".scale", ".weight_scale", ".scale_weight")


def read(path: Path | str, role: str) -> tuple[State, Detected]:
    """The tensors of a file under our names, and what the file was.

    Raises:
        CheckpointError: unreadable, unknown, or of another role.
    """
    path = Path(path)
    raw = read_tensors(path)
    found = detect(raw, str(path))
    if found.role != role:
        raise CheckpointError(f"{path} is {found}; a {ROLES[role]} is wanted here")
    return READERS[role, found.family](raw), found


def load_transformer(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    sla_topk: float | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    norms: str = "exact",
) -> WanTransformer:
    """Load a Wan transformer of any family, size and quantisation; a quantised file runs quantised.

    Args:
        path: a file, a shard index, or a folder that holds one of these.
        dtype: of the residual stream and the unquantised weights.
        attention: "auto" (SLA if the file has its projection, else dense), "original", "sla" or "sagesla".
        sla_topk: share of key blocks kept, 0.1 by default.
        block_q, block_k: tokens per block, 128 and 64 by default; the official SageSLA uses 64 and 128 on Hopper.
        norms: "exact", or "official" for the fast kernel's variance in norm1, norm2 and norm3.

    Raises:
        CheckpointError: the file cannot serve; the line says what was found and what was wanted.
    """
    state, found = read(path, "transformer")
    config = transformer_config(state, str(path))
    if norms not in VARIANCES:
        raise CheckpointError(f"norms must be one of {', '.join(VARIANCES)}, got '{norms}'")
    how = choose_attention(config, str(path), attention, sla_topk, block_q, block_k)
    with torch.device("meta"):
        net = WanTransformer(config, how, norms)
    replace_quantized(net, state)
    assign(net, state, str(path), device, dtype)
    return net.eval()


def choose_attention(
    config: TransformerConfig,
    name: str,
    attention: str = "auto",
    sla_topk: float | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
) -> AttentionConfig:
    """The attention a request gets from a file; asking for SLA where the file lacks its projection is an error."""
    if attention == "auto":
        attention = "sla" if config.has_sla else "original"
    how = AttentionConfig(attention)
    given = {"top_k": sla_topk, "block_q": block_q, "block_k": block_k}
    how = replace(how, **{key: value for key, value in given.items() if value is not None})
    if how.kind != "original" and not config.has_sla:
        raise CheckpointError(f"{name} has no SLA projection (proj_l), so it runs 'original' attention, not '{how.kind}'")
    return how


def transformer_config(state: Mapping[str, Tensor], name: str) -> TransformerConfig:
    """All sizes of a transformer from its tensors, under our names."""

    def shape(key: str) -> torch.Size:
        if key not in state:
            raise CheckpointError(f"{name} is incomplete: {key} is missing among {len(state)} tensors")
        return state[key].shape

    dim, patch = shape("patch_embedding.weight")
    if dim % HEAD_SIZE:
        raise CheckpointError(f"{name} has width {dim}, which is no multiple of the head size {HEAD_SIZE}")
    layers = {int(key.split(".")[1]) for key in state if key.startswith("blocks.")}
    if layers != set(range(len(layers))) or not layers:
        missing = sorted(set(range(max(layers, default=0) + 1)) - layers)
        raise CheckpointError(f"{name} is incomplete: of its blocks, {missing or 'all'} are missing")
    projections = sum(key.endswith(".proj_l.weight") for key in state)
    if projections not in (0, len(layers)):
        raise CheckpointError(f"{name} has SLA projections in {projections} of {len(layers)} blocks; all or none are wanted")
    return TransformerConfig(
        dim=dim,
        ffn_dim=shape("blocks.0.ffn.0.bias")[0],
        num_layers=len(layers),
        text_dim=shape("text_embedding.0.weight")[1],
        in_dim=patch // 4,
        out_dim=shape("head.head.bias")[0] // 4,
        freq_dim=shape("time_embedding.0.weight")[1],
        image_dim=shape("img_emb.proj.1.weight")[1] if "img_emb.proj.1.weight" in state else None,
        has_sla=projections > 0,
    )


def replace_quantized(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Swap each linear layer whose weight the state holds in 8 bits for the layer that computes with it."""
    for name, module in list(net.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        sizes = (module.in_features, module.out_features)
        weight = state.get(f"{name}.weight")
        with torch.device("meta"):
            if f"{name}.int8_weight" in state:
                net.set_submodule(name, Int8BlockLinear(*sizes))
            elif weight is not None and weight.dtype == torch.int8:
                net.set_submodule(name, Int8RowLinear(*sizes))
            elif weight is not None and weight.dtype in FP8:
                net.set_submodule(name, Fp8Linear(*sizes, bias=module.bias is not None, dtype=weight.dtype))


def assign(
    net: nn.Module, state: Mapping[str, Tensor], name: str, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Put a state's tensors into a module built on the meta device, on `device` and in `dtype`.

    Raises:
        CheckpointError: keys missing or left over, or a shape that differs, with counts and an example.
    """
    wanted = net.state_dict()
    scales = {key for key in wanted if key.endswith(".scale_weight")}  # plain fp8 files have no scales
    missing, extra = sorted(set(wanted) - set(state) - scales), sorted(set(state) - set(wanted))
    if missing or extra:
        parts = [
            f"{len(keys)} tensors are {what} (e.g. {keys[0]})"
            for keys, what in ((missing, "missing"), (extra, "not part of it"))
            if keys
        ]
        raise CheckpointError(f"{name} does not fit this model: {', '.join(parts)}")
    for key, value in wanted.items():
        if key in state and state[key].shape != value.shape:
            raise CheckpointError(
                f"{name}: {key} has shape {list(state[key].shape)}, expected {list(value.shape)}"
                " (are files of two sizes mixed?)"
            )
    placed = {}
    for key in wanted:
        value = state.get(key)
        if value is None:
            placed[key] = torch.ones(1, device=device)
        else:
            placed[key] = value.to(device=device, dtype=_target_dtype(key, value, dtype))
    net.load_state_dict(placed, assign=True)
    net.requires_grad_(False)


def _target_dtype(key: str, value: Tensor, dtype: torch.dtype) -> torch.dtype:
    if value.dtype == torch.int8 or key.endswith(_SCALES):
        return value.dtype if value.dtype == torch.int8 else torch.float32
    if value.dtype in FP8 and key.endswith(".weight") and value.ndim == 2:
        return value.dtype
    if value.dtype == torch.float32 and any(part in key for part in _FLOAT32_PARTS):
        return torch.float32
    return dtype


def load_vae(path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> WanVAE:
    """Load a Wan 2.1 VAE of any base width, in Wan's or diffusers' names.

    Raises:
        CheckpointError: the file cannot serve.
    """
    state, _ = read(path, "vae")
    widths = {m: state[k].shape[0] for m, k in ((1, "encoder.conv1.weight"), (4, "decoder.conv1.weight")) if k in state}
    if len(widths) < 2:
        raise CheckpointError(f"{path} is incomplete: it lacks the encoder's or the decoder's first convolution")
    dim, channels = widths[1], state["decoder.conv1.weight"].shape[1]
    if widths[4] != MULTIPLIERS[-1] * dim or channels != LATENT_CHANNELS:
        raise CheckpointError(
            f"{path} has widths {dim} to {widths[4]} and {channels} latent channels;"
            f" Wan 2.1 has {dim} to {MULTIPLIERS[-1] * dim} and {LATENT_CHANNELS}"
        )
    with torch.device("meta"):
        vae = WanVAE(dim)
    assign(vae, state, str(path), device, dtype)
    return vae.eval()


def load_text_encoder(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Load an umT5 encoder in Wan's, transformers' or ComfyUI's layout; fp8_scaled weights stay in 8 bits.

    Raises:
        CheckpointError: the file cannot serve.
    """
    from ..models.text_encoder import TextEncoder

    state, _ = read(path, "text_encoder")
    block = "encoder.block.0.layer"
    try:
        vocabulary, width = state["shared.weight"].shape
        heads = state[f"{block}.0.SelfAttention.relative_attention_bias.weight"].shape[1]
        with torch.device("meta"):
            encoder = TextEncoder(
                vocabulary=vocabulary,
                width=width,
                layers=1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.block.")),
                heads=heads,
                head_width=state[f"{block}.0.SelfAttention.q.weight"].shape[0] // heads,
                hidden=state[f"{block}.1.DenseReluDense.wi_0.weight"].shape[0],
            )
    except KeyError as error:
        raise CheckpointError(f"{path} is incomplete: {error.args[0]} is missing") from error
    replace_quantized(encoder.model, state)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    assign(encoder.model, state, str(path), device, dtype)
    encoder.model.encoder.embed_tokens.weight = encoder.model.shared.weight
    return encoder.eval()


def embedded_tokenizer(path: Path | str) -> bytes | None:
    """The SentencePiece model that ComfyUI's text encoder files carry, if this one does."""
    path = Path(path)
    if not path.is_file() or path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return bytes(file.get_tensor(SPIECE).tolist()) if SPIECE in file.keys() else None  # noqa: SIM118


def load_image_encoder(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ImageEncoder:
    """Load the CLIP vision tower of Wan 2.1 image-to-video, in Wan's, ComfyUI's or transformers' layout.

    Raises:
        CheckpointError: the file cannot serve.
    """
    from transformers import CLIPVisionConfig

    from ..models.image_encoder import ImageEncoder

    state, _ = read(path, "image_encoder")
    state = {k: v for k, v in state.items() if k.startswith("vision_model.") and not k.endswith(".position_ids")}
    embed = state["vision_model.embeddings.patch_embedding.weight"]
    positions = state["vision_model.embeddings.position_embedding.weight"].shape[0]
    layers = 1 + max(int(key.split(".")[3]) for key in state if ".encoder.layers." in key)
    config = CLIPVisionConfig(
        hidden_size=embed.shape[0],
        intermediate_size=state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=embed.shape[0] // 80 if embed.shape[0] % 80 == 0 else embed.shape[0] // 64,
        image_size=round((positions - 1) ** 0.5) * embed.shape[2],
        patch_size=embed.shape[2],
        hidden_act="gelu",
    )
    with torch.device("meta"):
        encoder = ImageEncoder(config)
    for module in encoder.modules():  # the one buffer that no file holds
        if getattr(module, "position_ids", None) is not None:
            module.position_ids = torch.arange(positions, device=device).unsqueeze(0)
    prefix = "" if any(k.startswith("vision_model.") for k in encoder.model.state_dict()) else "vision_model."
    assign(encoder.model, {k.removeprefix(prefix): v for k, v in state.items()}, str(path), device, dtype)
    return encoder.eval()
