"""The VAE's layers on a GPU: channels last from end to end, everything between two convolutions in one kernel.

The same network as in `vae.py`, whose modules hold the weights and say what the result is. Here a value is left as the
convolution made it; its bias and the skip connection are added by the kernel that reads it next (`ops.causal_input`),
which also norms it and puts the frames before it in their place. Several latent frames go through at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.registry import differentiated
from .vae import (
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    Decoder,
    Encoder,
    FrameAttention,
    Residual,
    SpatialDown,
    SpatialUp,
    SpatioTemporalDown,
    SpatioTemporalUp,
)

LATENTS_AT_ONCE = 5  # per chunk, at most
INDEXED = 2**31  # elements of a tensor that convolutions index with 32 bits
_UNIT = 8  # channels that tensor cores read and write at least; fewer are filled up with zeros


def serves(x: Tensor, coder: nn.Module) -> bool:
    """Whether these layers are for x: half precision on a GPU, all weights beside it, no gradient wanted."""
    if not x.is_cuda or differentiated((x, *coder.parameters())):
        return False
    return all(w.device == x.device and w.dtype in (torch.bfloat16, torch.float16) for w in coder.parameters())


def split_evenly(total: int, most: int) -> list[int]:
    """The fewest parts of at most `most` each, that differ by one at most, larger ones first."""
    count = -(-total // most)
    return [total // count + (i < total % count) for i in range(count)]


def chunk_sizes(latents: int, batch: int, height: int, width: int, channels: int) -> list[int]:
    """Latent frames of each chunk.

    Args:
        height, width: of the video. channels: of its widest tensor at full size.
    """
    frame = batch * height * width * channels
    most = (INDEXED - 1) // frame // TEMPORAL_FACTOR
    return split_evenly(latents, max(1, min(most, LATENTS_AT_ONCE)))


class Value:
    """x + bias + residual, not yet added up: [B, T, H, W, C]; the residual may lack frames that repeat its last."""

    def __init__(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
        self.x, self.bias, self.residual = x, bias, residual

    def take(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The terms, given up here: memory goes as soon as the taker lets go."""
        terms = self.x, self.bias, self.residual
        del self.x, self.bias, self.residual
        return terms


class Layers:
    """One pass through an encoder or decoder, in one chunk or several.

    Args:
        total: frames of a clip that repeats its last frame, of which only what still changes is computed; None: of one
            that is given whole or in chunks.
    """

    def __init__(self, total: int | None = None) -> None:
        self.total = total
        self.last = True  # no chunk comes after this one
        self._past: dict[nn.Module, Tensor] = {}
        self._weights: dict[nn.Module, Tensor] = {}

    def decode(self, decoder: Decoder, x: Tensor) -> Tensor:
        """[B, T, h, w, 16] -> float32 [B, T', 8 h, 8 w, 3]."""
        return self.rise(decoder, self.sum(self.middle(decoder.middle, self.first(decoder.conv1, x))))

    def rise(self, decoder: Decoder, x: Tensor) -> Tensor:
        """What comes after the middle."""
        value = Value(x)
        for layer in decoder.upsamples:
            value = self._layer(layer, value)
        return self.head(decoder.head, value)

    def sum(self, value: Value) -> Tensor:
        """Added up."""
        return self._causal(None, value, lookback=0)[0]

    def encode(self, encoder: Encoder, x: Tensor) -> Tensor:
        """[B, T, H, W, 3] -> float32 [B, T', H / 8, W / 8, 32]."""
        return self.head(encoder.head, self.middle(encoder.middle, Value(self.sink(encoder, x))))

    def sink(self, encoder: Encoder, x: Tensor) -> Tensor:
        """What comes before the middle."""
        value = self.first(encoder.conv1, x)
        for layer in encoder.downsamples:
            value = self._layer(layer, value)
        return self.sum(value)

    def middle(self, middle: Sequence[Any] | nn.ModuleList, value: Value) -> Value:
        for layer in middle:
            value = self._layer(layer, value)
        return value

    def first(self, conv: Any, x: Tensor) -> Value:
        filled = F.pad(x, (0, -x.shape[-1] % _UNIT))
        return Value(self._conv(conv, self._causal(conv, Value(filled))[0]), conv.bias)

    def head(self, head: Any, value: Value) -> Tensor:
        conv = head["2"]
        out = self._conv(conv, self._causal(conv, value, head["0"].gamma, silu=True)[0])
        return out[..., : conv.out_channels].float() + conv.bias.float()

    def _layer(self, layer: nn.Module, value: Value) -> Value:
        if isinstance(layer, Residual):
            return self._residual(layer, value)
        if isinstance(layer, FrameAttention):
            return self._attention(layer, value)
        if isinstance(layer, SpatialUp):
            return self._up(layer, value)
        assert isinstance(layer, SpatialDown)
        return self._down(layer, value)

    def _residual(self, block: Residual, value: Value) -> Value:
        layers: Any = block.residual
        norm, conv, next_norm, next_conv = (layers[i] for i in ("0", "2", "3", "6"))
        padded, x = self._causal(conv, value, norm.gamma, silu=True, keep=True)
        inner = Value(self._conv(conv, padded), conv.bias)
        padded = self._causal(next_conv, inner, next_norm.gamma, silu=True)[0]
        if block.shortcut is not None:
            x = F.linear(x, block.shortcut.weight.flatten(1), block.shortcut.bias)
        return Value(self._conv(next_conv, padded), next_conv.bias, x)

    def _attention(self, block: FrameAttention, value: Value) -> Value:
        normed, x = self._causal(None, value, block.norm.gamma, lookback=0, keep=True)
        rows = normed.flatten(2, 3).flatten(0, 1)
        q, k, v = F.linear(rows, block.to_qkv.weight.flatten(1), block.to_qkv.bias).unsqueeze(1).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v)
        return Value(F.linear(out.reshape(x.shape), block.proj.weight.flatten(1)), block.proj.bias, x)

    def _up(self, layer: SpatialUp, value: Value) -> Value:
        if isinstance(layer, SpatioTemporalUp):
            wide = ops.upsample(*self._doubled(layer, value))
        else:
            wide = ops.upsample(*value.take())
        conv: Any = layer.resample["1"]
        return Value(self._conv_frames(conv, wide, padding=1), conv.bias)

    def _doubled(self, layer: SpatioTemporalUp, value: Value) -> tuple[Tensor, Tensor | None, None, Tensor | None, int]:
        """Arguments of `upsample`: two frames for each but the clip's first, which later ones do not see either."""
        if layer in self._past:
            return self._conv(layer.time_conv, self._causal(layer, value)[0]), layer.time_conv.bias, None, None, 2
        x = self.sum(value)
        first, rest = x[:, :1], x[:, 1:]
        if not rest.shape[1]:
            if not self.last:  # nothing was seen yet: zeros
                self._past[layer] = x.new_zeros(x.shape[0], 2, *x.shape[2:])
            return first, None, None, None, 1
        pairs = self._conv(layer.time_conv, self._causal(layer, Value(rest))[0])
        return pairs, layer.time_conv.bias, None, first, 2

    def _down(self, layer: SpatialDown, value: Value) -> Value:
        x = F.pad(self.sum(value), (0, 0, 0, 1, 0, 1))
        conv: Any = layer.resample["1"]
        value = Value(self._conv_frames(conv, x, padding=0), conv.bias)
        del x
        if not isinstance(layer, SpatioTemporalDown):
            return value
        if layer in self._past:
            x = self._causal(layer, value, lookback=1)[0]
            return Value(self._conv(layer.time_conv, x), layer.time_conv.bias)
        frames = value.x.shape[1]
        if self.total is not None:  # to an odd length: the first frame and whole pairs
            frames = min(frames + 2 + (frames + 1) % 2, self.total)
            self.total = (self.total + 1) // 2
        x = self._causal(None, value, lookback=0, frames=frames)[0]
        if not self.last:
            self._past[layer] = x[:, -1:].clone()
        if frames == 1:
            return Value(x)
        pairs = self._conv(layer.time_conv, x) + cast(Tensor, layer.time_conv.bias)
        return Value(torch.cat([x[:, :1], pairs], dim=1))

    def _causal(
        self,
        layer: nn.Module | None,
        value: Value,
        gamma: Tensor | None = None,
        silu: bool = False,
        lookback: int = 2,
        frames: int = 0,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The frames that a layer remembers, then the value, normed; and the value's sum, if it is to be kept."""
        x, bias, residual = value.take()
        done = bias is None and residual is None
        if self.total is not None and layer is not None:
            frames = min(x.shape[1] + lookback, self.total)
        if done and gamma is None and not lookback and frames in (0, x.shape[1]):
            return x, x
        past = None if layer is None else self._past.get(layer)
        gamma = None if gamma is None else gamma.flatten()
        out, total = ops.causal_input(x, bias, residual, gamma, past, silu, lookback, frames, keep and not done)
        if layer is not None and not self.last:
            self._past[layer] = out[:, -lookback:].clone()
        return out, x if done else total

    def _conv(self, conv: Any, x: Tensor) -> Tensor:
        """Without its bias, over input that holds its past."""
        weight = self._weight(conv, x.shape[-1])
        out = ops.conv3d(x.permute(0, 4, 1, 2, 3), weight, None, conv.stride, conv.padding)
        return out.permute(0, 2, 3, 4, 1).contiguous()

    def _conv_frames(self, conv: Any, x: Tensor, padding: int) -> Tensor:
        frames = x.flatten(0, 1).permute(0, 3, 1, 2)
        out = F.conv2d(frames, self._weight(conv, x.shape[-1]), None, conv.stride, padding)
        return out.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])

    def _weight(self, conv: Any, channels: int) -> Tensor:
        """Channels last, as tensor cores read it; with zeros for the channels that fill up the input, and
        for those that fill up a picture's three."""
        if conv not in self._weights:
            weight = conv.weight
            fill = channels - weight.shape[1], _UNIT - 3 if weight.shape[0] == 3 else 0
            if any(fill):
                weight = F.pad(weight, (0, 0) * (weight.ndim - 2) + (0, fill[0], 0, fill[1]))
            layout = torch.channels_last_3d if weight.ndim == 5 else torch.channels_last
            self._weights[conv] = weight.contiguous(memory_format=layout)
        return self._weights[conv]


def decode(decoder: Decoder, x: Tensor, layers: Layers | None = None) -> Iterator[Tensor]:
    """[B, 16, T, h, w] to video, float32 [B, 3, T', H, W], in chunks, through fresh layers."""
    layers = layers or Layers()
    x = x.permute(0, 2, 3, 4, 1)
    widest = 2 * cast(Tensor, decoder.head["0"].gamma).shape[0]  # upsampled, before a convolution halves the channels
    sizes = chunk_sizes(x.shape[1], x.shape[0], SPATIAL_FACTOR * x.shape[2], SPATIAL_FACTOR * x.shape[3], widest)
    for i, part in enumerate(x.split(sizes, dim=1)):
        layers.last = i == len(sizes) - 1
        yield layers.decode(decoder, part).permute(0, 4, 1, 2, 3).contiguous()


def encode(encoder: Encoder, video: Tensor, layers: Layers | None = None) -> Tensor:
    """[B, 3, T, H, W] to float32 [B, 32, T', h, w], in chunks, or in one where the last frame is repeated."""
    layers = layers or Layers()
    x = video.permute(0, 2, 3, 4, 1)
    frames = x.shape[1]
    sizes = [frames]
    if layers.total is None:
        latents = (frames - 1) // TEMPORAL_FACTOR + 1
        latent_sizes = chunk_sizes(latents, x.shape[0], x.shape[2], x.shape[3], encoder.conv1.out_channels)
        sizes = [TEMPORAL_FACTOR * n for n in latent_sizes]
        sizes[0] -= TEMPORAL_FACTOR - 1
    out = []
    for i, part in enumerate(x.split(sizes, dim=1)):
        layers.last = i == len(sizes) - 1
        out.append(layers.encode(encoder, part))
    return torch.cat(out, dim=1).permute(0, 4, 1, 2, 3)
