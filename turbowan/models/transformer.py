"""The Wan diffusion transformer, for text and image conditioning, of any width and depth.

Source: Wan-Video/Wan2.1 and Wan2.2, and thu-ml/TurboDiffusion (all Apache-2.0) for the order of roundings.
Parameter names are those of the official files, so their readers have nothing to rename.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import RequestError
from .linear import Rows, format_of, hidden_rows, norm_rows, project

ATTENTION_KINDS = ("original", "sla", "sagesla")
HEAD_SIZE = 128
PATCH = (1, 2, 2)  # frames, height, width
EPS = 1e-6


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes, all read from the tensors of a file."""

    dim: int
    ffn_dim: int
    num_layers: int
    text_dim: int
    in_dim: int = 16  # latent and condition channels
    out_dim: int = 16
    freq_dim: int = 256
    image_dim: int | None = None  # width of CLIP tokens (Wan 2.1 image-to-video), None without them
    has_sla: bool = False  # whether the file holds SLA's proj_l

    @property
    def num_heads(self) -> int:
        return self.dim // HEAD_SIZE


@dataclass(frozen=True)
class AttentionConfig:
    """How self-attention runs. It is no part of the weights and may change between calls.

    kind: "original" (dense), "sla" or "sagesla". top_k: share of key blocks kept. block_q, block_k: tokens per block.
    """

    kind: str = "original"
    top_k: float = 0.1
    block_q: int = 128
    block_k: int = 64

    def __post_init__(self) -> None:
        if self.kind not in ATTENTION_KINDS:
            raise RequestError(f"attention must be one of auto, {', '.join(ATTENTION_KINDS)}, got '{self.kind}'")
        if not 0 < self.top_k <= 1:
            raise RequestError(f"sla_topk must be in (0, 1], got {self.top_k}")
        if self.block_q < 1 or self.block_k < 1:
            raise RequestError(f"attention blocks must be positive, got {self.block_q} x {self.block_k}")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width, before the split into heads."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, EPS)


class LayerNorm(nn.Module):
    """The affine part of a layer norm; `residual_norm` does the rest."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))


class SelfAttention(nn.Module):
    """q, k and v as layers of their own, or as one (`pack.join_qkv`)."""

    def __init__(self, dim: int, has_sla: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.qkv: nn.Module | None = None
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)
        self.proj_l = nn.Linear(HEAD_SIZE, HEAD_SIZE) if has_sla else None

    @property
    def format(self) -> str:
        return format_of(self.q, self.k, self.v) if self.qkv is None else format_of(self.qkv)

    def forward(self, rows: Rows, rotation: tuple[Tensor, Tensor], how: AttentionConfig, dtype: torch.dtype) -> Tensor:
        if self.qkv is None:
            q, k, v = (project(layer, rows, dtype) for layer in (self.q, self.k, self.v))
        else:
            q, k, v = project(self.qkv, rows, dtype).chunk(3, dim=-1)
        v = v.unflatten(-1, (-1, HEAD_SIZE))
        proj = None if how.kind == "original" else self.proj_l
        ready = proj is not None and q.is_cuda and not torch.is_grad_enabled()  # eager twins take their own means
        blocks = (how.block_q, how.block_k) if ready else (0, 0)
        weights = self.norm_q.weight, self.norm_k.weight
        q, k, q_means, k_means = ops.qk_norm_rope(q, k, *weights, *rotation, EPS, *blocks)
        if proj is None:
            out = ops.attention(q, k, v)
        else:
            precision = "int8" if how.kind == "sagesla" else "bf16"
            means = (q_means, k_means) if ready else None
            out = ops.sparse_linear_attention(
                q, k, v, proj.weight, proj.bias, how.top_k, how.block_q, how.block_k, precision, means
            )
        del q, k, v  # five times the result's size
        return self.o(out.flatten(2))  # type: ignore[no-any-return]


class KeysValues(NamedTuple):
    """What cross-attention takes from the text and the image tokens, the same in every step: [B, L, H, 128] each."""

    text: tuple[Tensor, Tensor]
    image: tuple[Tensor, Tensor] | None


class CrossAttention(nn.Module):
    """Attention to the text, and to image tokens where the model has them."""

    def __init__(self, dim: int, has_image: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)
        if has_image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim)

    def keys_values(self, text: Tensor, image: Tensor | None) -> KeysValues:
        """Of embedded text [B, L, D] and image tokens [B, 257, D]."""
        of_text = _heads(self.norm_k(self.k(text))), _heads(self.v(text))
        if image is None:
            return KeysValues(of_text, None)
        return KeysValues(of_text, (_heads(self.norm_k_img(self.k_img(image))), _heads(self.v_img(image))))

    def forward(self, rows: Rows, told: KeysValues, last_row_count: int, dtype: torch.dtype) -> Tensor:
        q = _heads(self.norm_q(project(self.q, rows, dtype)))
        out = ops.attention(q, *told.text, last_row_count)
        if told.image is not None:
            out = out + ops.attention(q, *told.image)
        return self.o(out.flatten(2))  # type: ignore[no-any-return]


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD_SIZE))


def _modulation(rows: int, dim: int) -> nn.Parameter:
    values = torch.empty(1, rows, dim)  # on the meta device, normal_ would import a second of Python
    return nn.Parameter(values if values.is_meta else values.normal_(std=dim**-0.5))


@dataclass(frozen=True)
class Context:
    """What a request tells every step: embedded text and image tokens, or what each block makes of them.

    text: [B, L, D], its last row standing for `last_row_count` equal ones. image: [B, 257, D].
    blocks: keys and values of each block; None where the blocks make them anew each time (training, little memory).
    """

    text: Tensor
    image: Tensor | None
    last_row_count: int
    blocks: tuple[KeysValues, ...] | None = None


# The residual stream [B, L, D], what the last layer is still to add to it, [B, L, D], and its gate, float32 [B, 1, D];
# None for these two before the first. In a list: whoever empties it holds them alone, and each goes when last read.
Stream = list[Any]


class Block(nn.Module):
    """Its last change is left to whatever reads the stream next, whose norm adds it on the way."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.modulation = _modulation(6, dim)
        self.self_attn = SelfAttention(dim, config.has_sla)
        self.norm3 = LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, config.image_dim is not None)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))

    def forward(
        self,
        stream: Stream,
        modulation: Tensor,
        rotation: tuple[Tensor, Tensor],
        context: Context,
        told: KeysValues | None,
        how: AttentionConfig,
        norms: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next stream.

        Args:
            stream: empty afterwards. modulation: float32 [B, 6, D], shared by all blocks, to which the block adds its
                own. told: of the text, made here if None.
        """
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (
            self.modulation.float() + modulation
        ).unsqueeze(2).unbind(1)
        told = told or self.cross_attn.keys_values(context.text, context.image)
        own, cross, first, second = self.self_attn, self.cross_attn, self.ffn[0], self.ffn[2]
        affine = {"weight": self.norm3.weight, "bias": self.norm3.bias}
        x, delta, gate = stream
        stream.clear()
        x, rows = norm_rows(x, own.format, EPS, norms, delta, gate, shift=shift_a, scale=scale_a)
        del delta
        x, rows = norm_rows(x, format_of(cross.q), EPS, norms, own(rows, rotation, how, x.dtype), gate_a, **affine)
        crossed = cross(rows, told, context.last_row_count, x.dtype)
        x, rows = norm_rows(x, format_of(first), EPS, norms, crossed, shift=shift_f, scale=scale_f)
        del crossed
        hidden = hidden_rows(first, rows, x.dtype, format_of(second))
        return x, project(second, hidden, x.dtype), gate_f


def settled(x: Tensor, delta: Tensor | None, gate: Tensor | None) -> Tensor:
    """The stream with its last change added."""
    return x if delta is None or gate is None else x + delta * gate.to(x.dtype)


class Head(nn.Module):
    """The last layer, in float32 whatever the model's dtype."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.modulation = _modulation(2, config.dim)
        self.head = nn.Linear(config.dim, PATCH[0] * PATCH[1] * PATCH[2] * config.out_dim)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + time.unsqueeze(1)).unsqueeze(2).unbind(1)
        return _linear_float32(self.head, modulate(ops.layer_norm(x, eps=EPS).float(), shift, scale))


class ImageEmbedding(nn.Module):
    """CLIP tokens to context tokens (Wan 2.1 image-to-video)."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(tokens)


class WanTransformer(nn.Module):
    """Predicts the velocity of a noisy latent.

    Args:
        config: sizes.
        attention: how self-attention runs; may be replaced at any time through the attribute of the same name.
        norms: "exact", or "official" for the fast kernel's variance in norm1, norm2 and norm3.
    """

    def __init__(
        self, config: TransformerConfig, attention: AttentionConfig | None = None, norms: str = "exact"
    ) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.attention = attention or AttentionConfig("sla" if config.has_sla else "original")
        self.norms = norms
        self.patch_embedding = nn.Linear(config.in_dim * PATCH[0] * PATCH[1] * PATCH[2], dim)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.img_emb = ImageEmbedding(config.image_dim, dim) if config.image_dim else None
        self._rotations: dict[tuple, tuple[Tensor, Tensor]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream: that of the patch embedding's bias (the weight may be in 8 bits)."""
        return self.patch_embedding.bias.dtype

    @property
    def condition_channels(self) -> int:
        """Channels the model takes besides the latent's: 20 for image-to-video, 0 for text-to-video."""
        return self.config.in_dim - self.config.out_dim

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        text: Tensor | Context,
        condition: Tensor | None = None,
        image_tokens: Tensor | None = None,
        text_rows: int | None = None,
    ) -> Tensor:
        """One evaluation. Rounds none of its inputs beyond what its own dtype does.

        Args:
            latent: [B, 16, T, H, W], H and W even.
            timestep: [B], 0..1000.
            text: [B, L, text_dim]; all L rows are attended to. Or what `tell` made of it, with the image tokens.
            condition: [B, 20, T, H, W] (4 mask channels, then 16 of the image latent) for image-to-video.
            image_tokens: [B, 257, 1280] CLIP tokens, for models with an image embedding.
            text_rows: the text counts as so many rows, the last given one standing for all that follow: a prompt of
                20 tokens as 21 rows of 512 gives the same result for a fraction of the work.

        Returns:
            The velocity, float32 [B, 16, T, H, W].

        Raises:
            RequestError: a tensor's shape does not fit the model.
        """
        context = text if isinstance(text, Context) else self._embed_context(text, image_tokens, text_rows)
        self._check(latent, timestep, condition, context)
        x = latent if condition is None else torch.cat([latent, condition.to(latent.dtype)], dim=1)
        grid = (x.shape[2] // PATCH[0], x.shape[3] // PATCH[1], x.shape[4] // PATCH[2])
        time = self._embed_time(timestep)
        modulation = _linear_float32(self.time_projection[1], F.silu(time)).unflatten(-1, (6, -1))
        x = self._run_blocks(patchify(x), modulation, self._rotation(grid, x.device), context)
        return unpatchify(self.head(x, time), grid)

    def _run_blocks(
        self, x: Tensor, modulation: Tensor, rotation: tuple[Tensor, Tensor], context: Context
    ) -> Tensor:
        """Of patches [B, L, 4 * C]. They are embedded here, so that no caller holds the result while the blocks run."""
        stream: Stream = [self.patch_embedding(x.to(self.dtype)), None, None]
        for i, block in enumerate(self.blocks):
            told = None if context.blocks is None else context.blocks[i]
            stream[:] = block(stream, modulation, rotation, context, told, self.attention, self.norms)
        return settled(*stream)

    def tell(
        self, text: Tensor, image_tokens: Tensor | None = None, text_rows: int | None = None, blocks: bool = True
    ) -> Context:
        """Text and image tokens, as `forward` takes them, turned once into every block's keys and values.

        Args:
            blocks: False leaves that to the blocks, in every step: for those whose weights come and go.
        """
        context = self._embed_context(text, image_tokens, text_rows)
        if not blocks:
            return context
        crossing = [module for module in self.modules() if isinstance(module, CrossAttention)]
        return replace(context, blocks=tuple(each.keys_values(context.text, context.image) for each in crossing))

    def _embed_context(self, text: Tensor, image_tokens: Tensor | None, text_rows: int | None) -> Context:
        if text.shape[-1] != self.config.text_dim:
            raise RequestError(f"this model takes text of width {self.config.text_dim}, got {text.shape[-1]}")
        width = None if image_tokens is None else image_tokens.shape[-1]
        if width != self.config.image_dim:
            wants = f"image tokens of width {self.config.image_dim}" if self.config.image_dim else "no image tokens"
            raise RequestError(f"this model takes {wants}, got {'none' if width is None else f'width {width}'}")
        embedded = self.text_embedding(text.to(self.dtype))
        image = None if self.img_emb is None or image_tokens is None else self.img_emb(image_tokens.to(self.dtype))
        return Context(embedded, image, 1 + max(0, (text_rows or 0) - text.shape[1]))

    def _embed_time(self, timestep: Tensor) -> Tensor:
        """[B] -> float32 [B, D]; the sinusoid in float64, the layers in float32."""
        half = self.config.freq_dim // 2
        frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
        angle = timestep.double()[:, None] * frequency
        sinusoid = torch.cat([angle.cos(), angle.sin()], dim=-1).float()
        hidden = F.silu(_linear_float32(self.time_embedding[0], sinusoid))
        return _linear_float32(self.time_embedding[2], hidden)

    def _rotation(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        key = (*grid, device)
        table = self._rotations.get(key)
        if table is None:
            with torch.inference_mode(False):  # kept for later calls, which may want gradients
                table = ops.rope_table(*grid, HEAD_SIZE, device)
            self._rotations = {key: table}
        return table

    def _check(self, latent: Tensor, timestep: Tensor, condition: Tensor | None, context: Context) -> None:
        channels = latent.shape[1] + (0 if condition is None else condition.shape[1])
        if channels != self.config.in_dim:
            raise RequestError(
                f"this model takes {self.config.in_dim} channels ({self.config.out_dim} latent"
                f" + {self.condition_channels} condition), got {channels}"
            )
        if latent.shape[-1] % PATCH[2] or latent.shape[-2] % PATCH[1]:
            raise RequestError(f"latent height and width must be even, got {latent.shape[-2]}x{latent.shape[-1]}")
        if condition is not None and condition.shape[2:] != latent.shape[2:]:
            sizes = ["x".join(map(str, x.shape[2:])) for x in (condition, latent)]
            raise RequestError(f"the condition must be as large as the latent, got {sizes[0]} and {sizes[1]}")
        given = {"timestep": timestep, "text": context.text, "condition": condition, "image tokens": context.image}
        counts = {name: len(x) if x.ndim else 0 for name, x in given.items() if x is not None}
        if set(counts.values()) != {len(latent)}:
            raise RequestError(f"every input needs the latent's {len(latent)} samples, got {counts}")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift in float32, rounded to x's dtype. x: [B, L, D]; shift, scale: float32 [B, 1, D]."""
    return (x.float() * (1 + scale) + shift).to(x.dtype)


def patchify(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B, T * H/2 * W/2, C * 4]: tokens t-major, features ordered channel, row, column."""
    x = x.unflatten(4, (-1, PATCH[2])).unflatten(3, (-1, PATCH[1]))  # B C T h 2 w 2
    return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpatchify(x: Tensor, grid: Sequence[int]) -> Tensor:
    """[B, L, 4 * C] -> [B, C, T, H, W]: features ordered row, column, channel (the channel last, unlike the input)."""
    x = x.unflatten(2, (PATCH[1], PATCH[2], -1)).unflatten(1, tuple(grid))  # B T h w 2 2 C
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)


def _linear_float32(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(layer, nn.Linear):
            return F.linear(x.float(), layer.weight.float(), layer.bias.float())
        return layer(x.float())  # 8-bit weights expand with their scale
