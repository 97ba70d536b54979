"""The Wan 2.1 video VAE: causal in time, 4 x 8 x 8 compression, 16 latent channels, of any base width.

Source: Wan-Video/Wan2.1 (Apache-2.0). Every layer that looks back in time asks a `Clip` for its past, so the same
layers encode a whole clip, stream one chunk after another, or stop early once a stage no longer changes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import RequestError

LATENT_CHANNELS = 16
SPATIAL_FACTOR = 8
TEMPORAL_FACTOR = 4
MULTIPLIERS = (1, 2, 4, 4)  # channels per level, times the base width
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def latent_frames(num_frames: int) -> int:
    """Latent frames of a clip of 4k+1 frames: k+1."""
    return (num_frames - 1) // TEMPORAL_FACTOR + 1


class Clip:
    """How a pass sees time. The plain one holds a whole clip at once: nothing came before it."""

    def past(self, layer: nn.Module) -> Tensor | None:
        """The last input frames that `layer` was told to remember; None on its first chunk."""
        return None

    def remember(self, layer: nn.Module, x: Tensor, frames: int) -> None:
        """Keep the last `frames` frames of the layer's input for its next chunk."""

    def grow(self, x: Tensor, frames: int) -> Tensor:
        """x with the further frames that must be computed before the output, too, stops changing."""
        return x

    def match(self, x: Tensor, frames: int) -> Tensor:
        """x as a clip of so many frames: what a skip connection is before it is added."""
        return x

    def halve(self) -> None:
        """Told by a layer that halves the frame rate."""


class Stream(Clip):
    """One chunk after another: each layer's last input frames are kept for its next chunk."""

    def __init__(self) -> None:
        self._past: dict[nn.Module, Tensor] = {}

    def past(self, layer: nn.Module) -> Tensor | None:
        return self._past.get(layer)

    def remember(self, layer: nn.Module, x: Tensor, frames: int) -> None:
        past = self._past.get(layer)
        seen = x if past is None else torch.cat([past, x[:, :, -frames:]], dim=2)
        self._past[layer] = seen[:, :, -frames:].clone()


class Steady(Clip):
    """A clip that repeats its last frame up to `total` frames: only the part that still changes is computed.

    A layer that looks back over n frames changes for n frames longer than its input does; `grow` gives it those.
    """

    def __init__(self, total: int) -> None:
        self.total = total

    def grow(self, x: Tensor, frames: int) -> Tensor:
        return self.match(x, min(x.shape[2] + frames, self.total))

    def match(self, x: Tensor, frames: int) -> Tensor:
        missing = frames - x.shape[2]
        return torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2) if missing > 0 else x

    def halve(self) -> None:
        self.total = (self.total + 1) // 2


class Conv3d(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return ops.conv3d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]


class CausalConv3d(Conv3d):
    """3-D convolution that sees the current and the two earlier frames; zeros before the clip's start."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel // 2, kernel // 2))
        self.lookback = kernel - 1

    def forward(self, x: Tensor, clip: Clip) -> Tensor:  # type: ignore[override]
        if self.lookback == 0:
            return super().forward(x)
        x = clip.grow(x, self.lookback)
        past = clip.past(self)
        clip.remember(self, x, self.lookback)
        return super().forward(_with_past(x, past, self.lookback))


def _with_past(x: Tensor, past: Tensor | None, frames: int) -> Tensor:
    """x with `frames` frames before it: the past ones, and zeros before the clip's start."""
    if past is not None:
        x = torch.cat([past, x], dim=2)
        frames -= past.shape[2]
    return F.pad(x, (0, 0, 0, 0, frames, 0)) if frames else x


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of each position."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        return ops.channel_norm(x, self.gamma, silu)


class Residual(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(in_channels, 3),
                "2": CausalConv3d(in_channels, out_channels, 3),
                "3": ChannelNorm(out_channels, 3),
                "6": CausalConv3d(out_channels, out_channels, 3),
            }
        )
        self.shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        layers = self.residual
        out = layers["2"](layers["0"](x, silu=True), clip)
        out = layers["6"](layers["3"](out, silu=True), clip)
        if self.shortcut is not None:
            x = self.shortcut(x, clip)
        return out + clip.match(x, out.shape[2])


class FrameAttention(nn.Module):
    """One attention head over all positions of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        frames = _frames(x)
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, frames.shape[2:])
        return x + _clip(self.proj(out), x.shape[0])


class SpatialDown(nn.Module):
    """Half the height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        return _clip(self.resample["1"](F.pad(_frames(x), (0, 1, 0, 1))), x.shape[0])


class SpatioTemporalDown(SpatialDown):
    """Half the height and width, and half the frame rate after the first frame, which stays as it is."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.time_conv = Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        x = super().forward(x, clip)
        x = clip.grow(x, 2 + (x.shape[2] + 1) % 2)  # to an odd length: the first frame and whole pairs
        clip.halve()
        past = clip.past(self)
        clip.remember(self, x, 1)
        if past is not None:
            return self.time_conv(torch.cat([past, x], dim=2))
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2) if x.shape[2] > 1 else x


class SpatialUp(nn.Module):
    """Twice the height and width, half the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels // 2, 3, padding=1)})

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        frames = F.interpolate(_frames(x), scale_factor=2.0, mode="nearest-exact")
        return _clip(self.resample["1"](frames), x.shape[0])


class SpatioTemporalUp(SpatialUp):
    """Twice the height and width, and two frames for each latent frame after the first."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.time_conv = Conv3d(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        past = clip.past(self)
        first, rest = x.tensor_split([1 if past is None else 0], dim=2)  # the clip's first frame is not doubled,
        clip.remember(self, rest, 2)  # nor is it seen by the frames after it
        if rest.shape[2]:
            pairs = self.time_conv(_with_past(rest, past, 2)).unflatten(1, (2, -1))
            rest = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return super().forward(torch.cat([first, rest], dim=2), clip)


def _frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B*T, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def _clip(x: Tensor, batch: int) -> Tensor:
    """[B*T, C, H, W] -> [B, C, T, H, W]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


class Middle(nn.ModuleList):
    def __init__(self, channels: int) -> None:
        super().__init__([Residual(channels, channels), FrameAttention(channels), Residual(channels, channels)])


class Output(nn.ModuleDict):
    """Norm, SiLU, convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__({"0": ChannelNorm(in_channels, 3), "2": CausalConv3d(in_channels, out_channels, 3)})

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        return self["2"](self["0"](x, silu=True), clip)


class Encoder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        widths = [dim * m for m in MULTIPLIERS]
        self.conv1 = CausalConv3d(3, dim, 3)
        layers: list[nn.Module] = []
        for level, width in enumerate(widths):
            layers += [Residual(widths[max(level - 1, 0)], width), Residual(width, width)]
            if level < len(widths) - 1:
                layers.append(SpatialDown(width) if level == 0 else SpatioTemporalDown(width))
        self.downsamples = nn.ModuleList(layers)
        self.middle = Middle(widths[-1])
        self.head = Output(widths[-1], 2 * LATENT_CHANNELS)

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        x = self.conv1(x, clip)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, clip)
        return self.head(x, clip)


class Decoder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        widths = [dim * m for m in reversed(MULTIPLIERS)]
        self.conv1 = CausalConv3d(LATENT_CHANNELS, widths[0], 3)
        self.middle = Middle(widths[0])
        layers: list[nn.Module] = []
        for level, width in enumerate(widths):
            came = width if level == 0 else widths[level - 1] // 2  # each step up halves the channels
            layers += [Residual(came, width), Residual(width, width), Residual(width, width)]
            if level < len(widths) - 1:
                layers.append(SpatioTemporalUp(width) if level < 2 else SpatialUp(width))
        self.upsamples = nn.ModuleList(layers)
        self.head = Output(widths[-1], 3)

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        x = self.conv1(x, clip)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, clip)
        return self.head(x, clip)


class WanVAE(nn.Module):
    """Video to normalised latents and back.

    Args:
        dim: base width, 96 in Wan 2.1.
    """

    def __init__(self, dim: int = 96) -> None:
        super().__init__()
        self.dim = dim
        self.encoder = Encoder(dim)
        self.conv1 = CausalConv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.conv2 = CausalConv3d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self.decoder = Decoder(dim)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and 1 / std per channel, in the VAE's dtype as the official code has them: [16, 1, 1, 1]."""
        mean, std = (torch.tensor(x, device=self.conv1.weight.device) for x in (LATENT_MEAN, LATENT_STD))
        return mean.to(self.dtype).view(-1, 1, 1, 1), (1 / std.to(self.dtype)).view(-1, 1, 1, 1)

    def _normalise(self, encoded: Tensor) -> Tensor:
        mean, inverse_std = self._statistics()
        latent = self.conv1(encoded.to(self.dtype), Clip())[:, :LATENT_CHANNELS]
        return ((latent - mean) * inverse_std).float().contiguous()

    def encode(self, video: Tensor) -> Tensor:
        """Video to latent, streaming over chunks of four frames.

        Args:
            video: [B, 3, 4k+1, H, W] in -1..1, H and W multiples of 8.

        Returns:
            float32 [B, 16, k+1, H/8, W/8], mean 0 and standard deviation 1 per channel.

        Raises:
            RequestError: the frame count is not 4k+1 or the size is no multiple of 8.
        """
        from . import vae_fused

        _check_video(video.shape[2], *video.shape[-2:])
        if vae_fused.serves(video, self):
            return self._normalise(vae_fused.encode(self.encoder, video.to(self.dtype)))
        stream = Stream()
        chunks = [video[:, :, :1], *video[:, :, 1:].split(TEMPORAL_FACTOR, dim=2)]
        encoded = [self.encoder(chunk.to(self.dtype), stream) for chunk in chunks if chunk.shape[2]]
        return self._normalise(torch.cat(encoded, dim=2))

    def encode_whole(self, video: Tensor) -> Tensor:
        """`encode` in one pass over the whole clip: faster for many small clips, memory grows with their length."""
        _check_video(video.shape[2], *video.shape[-2:])
        return self._normalise(self.encoder(video.to(self.dtype), Clip()))

    def encode_first_frame(self, image: Tensor, num_frames: int, budget: int | None = None) -> Tensor:
        """The latent of a clip whose first frame is `image` and whose others are 0.0, for a fraction of the work.

        Each stage computes frames only until its output stops changing, then repeats the last one.

        Args:
            image: [B, 3, H, W] in -1..1.
            num_frames: 4k+1.
            budget: bytes for the layers before the middle, of what is fused on a GPU; it chooses where there is none.

        Returns:
            float32 [B, 16, k+1, H/8, W/8], equal to `encode` of the whole clip up to rounding.
        """
        _check_video(num_frames, *image.shape[-2:])
        from . import vae_fused

        clip = Steady(num_frames)
        image = image.to(self.dtype).unsqueeze(2)
        start = torch.cat([image, torch.zeros_like(image)], dim=2)[:, :, :num_frames]
        if vae_fused.serves(start, self):
            encoded = vae_fused.encode(self.encoder, start, num_frames, budget)
        else:
            encoded = self.encoder(start, clip)
        return self._normalise(clip.match(encoded, latent_frames(num_frames)))

    def decode(self, latent: Tensor) -> Tensor:
        """Latent [B, 16, k+1, h, w] to video, float32 [B, 3, 4k+1, 8h, 8w], not clamped to -1..1."""
        return torch.cat(list(self.decode_stream(latent)), dim=2)

    def decode_stream(self, latent: Tensor, budget: int | None = None) -> Iterator[Tensor]:
        """Yield float32 [B, 3, 1, H, W] first, then [B, 3, 4, H, W] chunks in order; together they are `decode`.

        Args:
            budget: bytes for the layers after the middle, of what is fused on a GPU; it chooses where there is none.
        """
        from . import vae_fused

        mean, inverse_std = self._statistics()
        x = self.conv2(latent.to(self.dtype) / inverse_std + mean, Clip())
        if vae_fused.serves(x, self):
            for several in vae_fused.decode(self.decoder, x, budget):
                fours, first = divmod(several.shape[2], TEMPORAL_FACTOR)
                yield from several.float().split([1] * first + [TEMPORAL_FACTOR] * fours, dim=2)
            return
        stream = Stream()
        for frame in x.split(1, dim=2):
            yield self.decoder(frame, stream).float()


def _check_video(num_frames: int, height: int, width: int) -> None:
    if num_frames < 1 or (num_frames - 1) % TEMPORAL_FACTOR:
        raise RequestError(f"frame count must be 4k+1 (1, 5, 9, ... 81), got {num_frames}")
    if height % SPATIAL_FACTOR or width % SPATIAL_FACTOR or height < SPATIAL_FACTOR or width < SPATIAL_FACTOR:
        raise RequestError(f"video height and width must be multiples of {SPATIAL_FACTOR}, got {height}x{width}")
