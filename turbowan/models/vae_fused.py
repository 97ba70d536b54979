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
from ..ops.causal_input import widened
from ..ops.registry import differentiated
from . import vae_tiles
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
MIDDLE_AT_ONCE = 32  # at an eighth of the size
INDEXED = 2**31  # elements of a tensor that convolutions index with 32 bits
PAIRED = 96  # channels of a convolution that works on pairs of columns, at most
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


def most_at_once(batch: int, height: int, width: int, channels: int) -> int:
    """Latent frames of a chunk, at most.

    Args:
        height, width: of the latent. channels: of its widest tensor at full size.
    """
    frame = batch * SPATIAL_FACTOR**2 * height * width * channels
    return max(1, min((INDEXED - 1) // frame // TEMPORAL_FACTOR, LATENTS_AT_ONCE))


def free_memory(x: Tensor) -> int:
    """Bytes that x's device still has for us."""
    if not x.is_cuda:
        return 1 << 62
    reserved = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
    return torch.cuda.mem_get_info(x.device)[0] + reserved


def paired(layer: nn.Module, width: int) -> bool:
    """Whether a layer convolves pairs of columns as if they were channels.

    cuDNN's convolutions from 96 channels to 96 reach 263 TFLOP/s on an H200, from 192 to 192 they reach 568: with a
    quarter of the products wasted on zeros, pairs are faster.
    """
    return (
        isinstance(layer, nn.Conv3d)
        and layer.kernel_size == (3, 3, 3)
        and max(layer.in_channels, layer.out_channels) <= PAIRED
        and width % 2 == 0
    )


def for_pairs(weight: Tensor) -> Tensor:
    """[N, C, 3, 3, 3] to [2 N, 2 C, 3, 3, 2]: for two columns' results, over pairs that begin one column earlier."""
    n, c = weight.shape[:2]
    out = weight.new_zeros(2, n, 2, c, 3, 3, 2)
    for to in range(2):
        for tap in range(3):
            pair, column = divmod(to + tap, 2)
            out[to, :, column, :, :, :, pair] = weight[..., tap]
    return out.flatten(2, 3).flatten(0, 1)


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

    def rise(self, decoder: Decoder, x: Tensor) -> Tensor:
        """What comes after the middle."""
        value = Value(x)
        for layer in decoder.upsamples:
            value = self._layer(layer, value)
        return self.head(decoder.head, value)

    def sum(self, value: Value) -> Tensor:
        """Added up."""
        return self._causal(None, value, lookback=0)[0]

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
        return widened(out[..., : conv.out_channels]) + widened(conv.bias)

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
        margin = int(layer is not None and paired(layer, x.shape[3]))
        if self.total is not None and layer is not None:
            frames = min(x.shape[1] + lookback, self.total)
        if done and gamma is None and not lookback and frames in (0, x.shape[1]):
            return x, x
        past = None if layer is None else self._past.get(layer)
        gamma = None if gamma is None else gamma.flatten()
        out, total = ops.causal_input(x, bias, residual, gamma, past, silu, lookback, frames, keep and not done, margin)
        if layer is not None and not self.last:
            self._past[layer] = out[:, -lookback:, :, margin : out.shape[3] - margin].clone()
        return out, x if done else total

    def _conv(self, conv: Any, x: Tensor) -> Tensor:
        """Without its bias, over input that holds its past, and columns of zeros for one that works on pairs."""
        weight, padding, pairs = self._weight(conv, x), conv.padding, paired(conv, x.shape[3])
        if pairs:
            x, padding = x.unflatten(3, (-1, 2)).flatten(4), (0, 1, 0)
        out = ops.conv3d(x.permute(0, 4, 1, 2, 3), weight, None, conv.stride, padding)
        out = out.permute(0, 2, 3, 4, 1).contiguous()
        return out.unflatten(4, (2, -1)).flatten(3, 4) if pairs else out

    def _conv_frames(self, conv: Any, x: Tensor, padding: int) -> Tensor:
        frames = x.flatten(0, 1).permute(0, 3, 1, 2)
        out = F.conv2d(frames, self._weight(conv, x), None, conv.stride, padding)
        return out.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])

    def _weight(self, conv: Any, x: Tensor) -> Tensor:
        """Channels last, as tensor cores read it; with zeros for the channels that fill up the input, and
        for those that fill up a picture's three."""
        if conv not in self._weights:
            weight, pairs = conv.weight, paired(conv, x.shape[3])
            fill = x.shape[-1] - weight.shape[1], _UNIT // (1 + pairs) - 3 if weight.shape[0] == 3 else 0
            if any(fill):
                weight = F.pad(weight, (0, 0) * (weight.ndim - 2) + (0, fill[0], 0, fill[1]))
            if pairs:
                weight = for_pairs(weight)
            layout = torch.channels_last_3d if weight.ndim == 5 else torch.channels_last
            self._weights[conv] = weight.contiguous(memory_format=layout)
        return self._weights[conv]


def decode(decoder: Decoder, x: Tensor, budget: int | None = None) -> Iterator[Tensor]:
    """[B, 16, T, h, w] to video, float32 [B, 3, T', H, W], in chunks.

    Args:
        budget: bytes it may take, four fifths of the device's free memory if not given. Where that is little, the
            layers after the middle run tile by tile over the whole clip, which then comes out with the last one.
    """
    x = x.permute(0, 2, 3, 4, 1)
    batch, latents, height, width, _ = x.shape
    layers, deep = Layers(), []
    for part in _chunks(layers, x, split_evenly(latents, MIDDLE_AT_ONCE)):
        deep.append(layers.sum(layers.middle(decoder.middle, layers.first(decoder.conv1, part))))
    x = deep[0] if len(deep) == 1 else torch.cat(deep, dim=1)
    del deep, part

    grid = decoder_grid(decoder, x, budget)
    sizes = split_evenly(latents, grid.latents)
    if grid.whole:
        layers = Layers()
        for part in _chunks(layers, x, sizes):
            yield layers.rise(decoder, part).permute(0, 4, 1, 2, 3).contiguous()
        return
    frames = TEMPORAL_FACTOR * (latents - 1) + 1
    video = widened(x[:0, :0]).new_empty((batch, 3, frames, SPATIAL_FACTOR * height, SPATIAL_FACTOR * width))
    tiles = list(grid.tiles(height, width, vae_tiles.DECODER_HALO))
    for rows, columns in tiles:
        layers, done = Layers(), 0
        for part in _chunks(layers, x[:, :, rows.read, columns.read], sizes):
            tile = layers.rise(decoder, part)
            tile = tile[:, :, rows.crop(SPATIAL_FACTOR), columns.crop(SPATIAL_FACTOR)].permute(0, 4, 1, 2, 3)
            place = video[:, :, done : done + tile.shape[2]]
            place[..., rows.kept(SPATIAL_FACTOR), columns.kept(SPATIAL_FACTOR)] = tile
            done += tile.shape[2]
            if (rows, columns) == tiles[-1]:
                yield place


def encode(encoder: Encoder, video: Tensor, total: int | None = None, budget: int | None = None) -> Tensor:
    """[B, 3, T, H, W] to float32 [B, 32, T', h, w].

    Args:
        total: see `Layers`. budget: as of `decode`; the layers before the middle run in tiles.
    """
    x = video.permute(0, 2, 3, 4, 1)
    latents = (x.shape[1] - 1) // TEMPORAL_FACTOR + 1
    height, width = (n // SPATIAL_FACTOR for n in x.shape[2:4])
    grid = encoder_grid(encoder, x, total, budget)
    sizes = [x.shape[1]]
    if total is None:
        sizes = [TEMPORAL_FACTOR * n for n in split_evenly(latents, grid.latents)]
        sizes[0] -= TEMPORAL_FACTOR - 1
    deep = None
    for rows, columns in grid.tiles(height, width, vae_tiles.ENCODER_HALO):
        layers, parts = Layers(total), []
        read = [slice(SPATIAL_FACTOR * s.start, SPATIAL_FACTOR * s.stop) for s in (rows, columns)]
        for part in _chunks(layers, x[:, :, read[0], read[1]], sizes):
            parts.append(layers.sink(encoder, part))
        tile = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if grid.whole:
            deep = tile
            break
        if deep is None:
            deep = tile.new_empty((*tile.shape[:2], height, width, tile.shape[-1]))
        deep[:, :, rows.kept(), columns.kept()] = tile[:, :, rows.crop(), columns.crop()]
    assert deep is not None
    out = []
    layers = Layers(layers.total)
    for part in _chunks(layers, deep, [deep.shape[1]] if total else split_evenly(deep.shape[1], MIDDLE_AT_ONCE)):
        out.append(layers.head(encoder.head, layers.middle(encoder.middle, Value(part))))
    return torch.cat(out, dim=1).permute(0, 4, 1, 2, 3)


def _chunks(layers: Layers, x: Tensor, sizes: Sequence[int]) -> Iterator[Tensor]:
    """x in parts over time, of which the layers know which is the last."""
    for i, part in enumerate(x.split(list(sizes), dim=1)):
        layers.last = i == len(sizes) - 1
        yield part


def decoder_grid(decoder: Decoder, x: Tensor, budget: int | None = None) -> vae_tiles.Grid:
    """Tiles and chunks for what the middle gave, [B, T, h, w, C]."""
    batch, latents, height, width, _ = x.shape
    base = cast(Tensor, decoder.head["0"].gamma).shape[0]
    number = batch * vae_tiles.FULL * base * x.element_size()
    result = 4 * 3 * batch * vae_tiles.FULL  # float32, per position and frame
    most = min(latents, most_at_once(batch, height, width, 2 * base))  # upsampled, before a convolution halves channels
    budget = free_memory(x) * 4 // 5 if budget is None else budget
    per_latent = TEMPORAL_FACTOR * vae_tiles.DECODER_UNITS * number
    whole = vae_tiles.choose(
        budget, height, width, vae_tiles.DECODER_HALO, most, per_latent, vae_tiles.DECODER_PAST * number
    )
    if whole.whole:
        return whole
    budget -= result * height * width * TEMPORAL_FACTOR * latents  # tiles are put together
    return vae_tiles.choose(
        budget, height, width, vae_tiles.DECODER_HALO, 1, per_latent, vae_tiles.DECODER_PAST * number
    )


def encoder_grid(encoder: Encoder, x: Tensor, total: int | None, budget: int | None = None) -> vae_tiles.Grid:
    """Tiles and chunks for a video [B, T, H, W, 3]."""
    height, width = (n // SPATIAL_FACTOR for n in x.shape[2:4])
    base = encoder.conv1.out_channels
    number = x.shape[0] * vae_tiles.FULL * base * x.element_size()
    budget = free_memory(x) * 4 // 5 if budget is None else budget
    most = 1 if total else most_at_once(x.shape[0], height, width, base)
    frames = vae_tiles.STEADY_FRAMES if total else TEMPORAL_FACTOR
    past = 0 if total else vae_tiles.ENCODER_PAST
    return vae_tiles.choose(
        budget, height, width, vae_tiles.ENCODER_HALO, most, frames * vae_tiles.ENCODER_UNITS * number, past * number
    )
