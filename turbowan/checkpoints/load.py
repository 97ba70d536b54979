"""From a file to a module: detect, rename, size from the tensors, assign. Nothing is allocated twice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError, RequestError
from ..models.text_encoder import TextEncoder
from ..models.transformer import HEAD_SIZE, AttentionConfig, TransformerConfig, WanTransformer
from ..models.vae import LATENT_CHANNELS, MULTIPLIERS, WanVAE
from ..ops.layer_norm import VARIANCES
from .assign import TRANSFORMER_FLOAT32, EachBlock, Report, assign, check_fit, fit_quantized
from .comfy import SPIECE
from .detect import ROLES, Detected, detect, strip_prefixes
from .families import READERS
from .files import PICKLED, SAFETENSORS, State, read_tensors
from .scales import read_scales

if TYPE_CHECKING:
    from ..models.image_encoder import ImageEncoder


def read(path: Path | str, role: str | None = None) -> tuple[State, Detected]:
    """The tensors of a file under our names, and what the file was.

    Args:
        role: a key of `ROLES` that the file must have; any by default.

    Raises:
        CheckpointError: unreadable, unknown, or of another role.
    """
    path = Path(path)
    raw = read_tensors(path)
    found = detect(raw, str(path))
    if role is not None and found.role != role:
        raise CheckpointError(f"{path} is {found}; a {ROLES[role]} is wanted here")
    try:
        return read_scales(READERS[found.role, found.family](strip_prefixes(raw))), found
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_transformer(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    sla_topk: float | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    norms: str = "exact",
    report: Report | None = None,
    each_block: EachBlock | None = None,
) -> WanTransformer:
    """Load a Wan transformer of any family, size and quantisation; a quantised file runs quantised.

    Args:
        path: a file, a shard index, or a folder that holds one of these.
        dtype: of the residual stream and the unquantised weights.
        attention: "auto" (SLA if the file has its projection, else dense), "original", "sla" or "sagesla".
        sla_topk: share of key blocks kept, 0.1 by default.
        block_q, block_k: tokens per block, 128 and 64 by default; the official SageSLA uses 64 and 128 on Hopper.
        norms: "exact", or "official" for the fast kernel's variance in norm1, norm2 and norm3.
        report: called as the weights come, with the bytes read and in all.
        each_block: called with each block as soon as it is there, before the next one is: see `assign`.

    Raises:
        CheckpointError: the file cannot serve, or lacks SLA's projection where SLA is asked for; the line says what
            was found and what was wanted.
        RequestError: `attention`, `sla_topk`, `block_q`, `block_k` or `norms` has a value that there is not.
    """
    if norms not in VARIANCES:
        raise RequestError(f"norms must be one of {', '.join(VARIANCES)}, got '{norms}'")
    state, _ = read(path, "transformer")
    net, state = empty_transformer(state, str(path))
    net.attention = choose_attention(net.config, str(path), attention, sla_topk, block_q, block_k)
    net.norms = norms
    assign(net, state, device, dtype, TRANSFORMER_FLOAT32, report, each_block)
    return net.eval()


def empty_transformer(state: State, name: str) -> tuple[WanTransformer, State]:
    """A transformer on the meta device that a state under our names fits, and what of the state goes into it.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape.
    """
    config = transformer_config(state, name)
    with on_meta():
        net = WanTransformer(config)
    state = fit_quantized(net, state)
    check_fit(net, state, name)
    return net, state


def choose_attention(
    config: TransformerConfig,
    name: str,
    attention: str = "auto",
    sla_topk: float | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
) -> AttentionConfig:
    """The attention a request gets from a file.

    Raises:
        CheckpointError: SLA is asked for and the file lacks its projection.
        RequestError: a value that there is not.
    """
    if attention == "auto":
        attention = "sla" if config.has_sla else "original"
    how = AttentionConfig(attention)
    given: dict[str, Any] = {"top_k": sla_topk, "block_q": block_q, "block_k": block_k}
    how = replace(how, **{key: value for key, value in given.items() if value is not None})
    if how.kind != "original" and not config.has_sla:
        raise CheckpointError(
            f"{name} has no SLA projection (proj_l): it runs 'original' attention, not '{how.kind}'"
        )
    return how


def transformer_config(state: Mapping[str, Tensor], name: str) -> TransformerConfig:
    """All sizes of a transformer from its tensors, under our names."""

    def shape(key: str) -> tuple[int, ...]:
        return _shape(state, key, 1 if key.endswith(".bias") else 2, name)

    dim, patch = shape("patch_embedding.weight")
    if dim % HEAD_SIZE:
        raise CheckpointError(f"{name} has width {dim}, which is no multiple of the head size {HEAD_SIZE}")
    layers = _count(state, r"blocks\.(\d+)\.", name)
    projections = sum(key.endswith(".proj_l.weight") for key in state)
    if projections not in (0, layers):
        raise CheckpointError(f"{name} has SLA projections in {projections} of {layers} blocks; all or none are wanted")
    return TransformerConfig(
        dim=dim,
        ffn_dim=shape("blocks.0.ffn.0.bias")[0],
        num_layers=layers,
        text_dim=shape("text_embedding.0.weight")[1],
        in_dim=patch // 4,
        out_dim=shape("head.head.bias")[0] // 4,
        freq_dim=shape("time_embedding.0.weight")[1],
        image_dim=shape("img_emb.proj.1.weight")[1] if "img_emb.proj.1.weight" in state else None,
        has_sla=projections > 0,
    )


def _shape(state: Mapping[str, Tensor], key: str, dims: int, name: str) -> tuple[int, ...]:
    """A tensor's shape, which must have so many dimensions; a weight may be there as int8 blocks."""
    blocks = f"{key.removesuffix('.weight')}.int8_weight"
    key = blocks if key not in state and blocks in state else key
    if key not in state:
        raise CheckpointError(f"{name} is incomplete: {key} is missing among {len(state)} tensors")
    shape = tuple(state[key].shape)
    if len(shape) != dims:
        raise CheckpointError(f"{name}: {key} has shape {list(shape)}, expected {dims} dimensions")
    return shape


def _count(state: Mapping[str, Tensor], pattern: str, name: str) -> int:
    """How many blocks there are, numbered from 0 without a gap by the pattern's group."""
    numbers = {int(match[1]) for match in (re.match(pattern, key) for key in state) if match}
    if not numbers or numbers != set(range(len(numbers))):
        missing = sorted(set(range(max(numbers, default=0) + 1)) - numbers)
        raise CheckpointError(f"{name} is incomplete: of its blocks, {missing or 'all'} are missing")
    return len(numbers)


def load_vae(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    report: Report | None = None,
) -> WanVAE:
    """Load a Wan 2.1 VAE of any base width, in Wan's or diffusers' names.

    Raises:
        CheckpointError: the file cannot serve.
    """
    vae, state = empty_vae(read(path, "vae")[0], str(path))
    assign(vae, state, device, dtype, report=report)
    return vae.eval()


def empty_vae(state: State, name: str) -> tuple[WanVAE, State]:
    """As `empty_transformer`, for a VAE."""
    dim = _shape(state, "encoder.conv1.weight", 5, name)[0]
    widest, channels = _shape(state, "decoder.conv1.weight", 5, name)[:2]
    if widest != MULTIPLIERS[-1] * dim or channels != LATENT_CHANNELS:
        raise CheckpointError(
            f"{name} has widths {dim} to {widest} and {channels} latent channels;"
            f" Wan 2.1 has {dim} to {MULTIPLIERS[-1] * dim} and {LATENT_CHANNELS}"
        )
    with on_meta():
        vae = WanVAE(dim)
    state = fit_quantized(vae, state)
    check_fit(vae, state, name)
    return vae, state


def load_text_encoder(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    report: Report | None = None,
) -> TextEncoder:
    """Load an umT5 encoder in Wan's, transformers' or ComfyUI's layout; fp8_scaled weights stay in 8 bits.

    Raises:
        CheckpointError: the file cannot serve.
    """
    encoder, state = empty_text_encoder(read(path, "text_encoder")[0], str(path))
    assign(encoder.model, state, device, dtype, report=report)
    return encoder.eval()


def empty_text_encoder(state: State, name: str) -> tuple[TextEncoder, State]:
    """As `empty_transformer`, for an umT5 encoder (the state is that of its `model`)."""

    def shape(key: str) -> tuple[int, ...]:
        return _shape(state, key, 2, name)

    block = "encoder.block.0.layer"
    vocabulary, width = shape("shared.weight")
    heads = shape(f"{block}.0.SelfAttention.relative_attention_bias.weight")[1]
    with on_meta():
        encoder = TextEncoder(
            vocabulary=vocabulary,
            width=width,
            layers=_count(state, r"encoder\.block\.(\d+)\.", name),
            heads=heads,
            head_width=shape(f"{block}.0.SelfAttention.q.weight")[0] // heads,
            hidden=shape(f"{block}.1.DenseReluDense.wi_0.weight")[0],
        )
    state = fit_quantized(encoder.model, state)
    check_fit(encoder.model, state, name)
    return encoder, state


def load_image_encoder(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    report: Report | None = None,
) -> ImageEncoder:
    """Load the CLIP vision tower of Wan 2.1 image-to-video, in Wan's, ComfyUI's or transformers' layout.

    Raises:
        CheckpointError: the file cannot serve.
    """
    encoder, state = empty_image_encoder(read(path, "image_encoder")[0], str(path))
    for module in encoder.modules():  # the one buffer that no file holds
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor):
            module.position_ids = torch.arange(ids.shape[1], device=device).unsqueeze(0)
    assign(encoder.model, state, device, dtype, report=report)
    return encoder.eval()


def empty_image_encoder(state: State, name: str) -> tuple[ImageEncoder, State]:
    """As `empty_transformer`, for a CLIP tower (the state is that of its `model`, without a text tower)."""
    from transformers import CLIPVisionConfig

    from ..models.image_encoder import ImageEncoder

    state = {k: v for k, v in state.items() if k.startswith("vision_model.") and not k.endswith(".position_ids")}
    width, _, patch, _ = _shape(state, "vision_model.embeddings.patch_embedding.weight", 4, name)
    positions = _shape(state, "vision_model.embeddings.position_embedding.weight", 2, name)[0]
    head_size = 80 if width % 80 == 0 else 64  # ViT-H's, and that of all the others
    if width % head_size:
        raise CheckpointError(f"{name} has width {width}, which is no multiple of the head sizes 64 and 80")
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=_shape(state, "vision_model.encoder.layers.0.mlp.fc1.weight", 2, name)[0],
        num_hidden_layers=_count(state, r"vision_model\.encoder\.layers\.(\d+)\.", name),
        num_attention_heads=width // head_size,
        image_size=round((positions - 1) ** 0.5) * patch,
        patch_size=patch,
        hidden_act="gelu",
    )
    with on_meta():
        encoder = ImageEncoder(config)
    prefix = "" if any(k.startswith("vision_model.") for k in encoder.model.state_dict()) else "vision_model."
    state = {key.removeprefix(prefix): value for key, value in state.items()}
    check_fit(encoder.model, state, name)
    return encoder, state


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules made here have shapes and no values. Drawing first values, even none, would import all of torch.compile:
    seconds of a program's start."""
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


EMPTY: dict[str, Callable[[State, str], tuple[Any, State]]] = {
    "transformer": empty_transformer,
    "vae": empty_vae,
    "text_encoder": empty_text_encoder,
    "image_encoder": empty_image_encoder,
}


def outline(state: State, role: str, name: str) -> Any:
    """The module a state makes, on the meta device: all its sizes and the file's dtypes, none of its values.

    Args:
        state: under our names. role: a key of `EMPTY`. name: how to call the file in an error.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape.
    """
    part, state = EMPTY[role]({key: value.to("meta") for key, value in state.items()}, name)
    getattr(part, "model", part).load_state_dict(state, assign=True)
    return part


def embedded_tokenizer(path: Path | str) -> bytes | None:
    """The SentencePiece model that ComfyUI's text encoder files carry, if this one does."""
    path = Path(path)
    if not path.is_file() or path.suffix not in SAFETENSORS + PICKLED:
        return None
    piece = read_tensors(path).get(SPIECE)
    return None if piece is None else piece.numpy().tobytes()
