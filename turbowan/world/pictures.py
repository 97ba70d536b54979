"""Still pictures rich enough to stand for photographs, and a camera that moves over any picture.

Dead leaves (Lee, Mumford and Huang 2001): shapes of all sizes, each hiding what lies below, share edges and statistics
of scale with photographs. Each leaf has a texture of 1/f noise and a shade.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .scenes import CAMERAS

LEAVES = 90
CANVAS = (1.7, 2.5)  # height and width of a drawn picture, in heights of the frame
PAN = (0.35, 0.7)  # the way of a pan in heights of the frame, from the least to the most
ZOOM = (0.45, 0.8)  # of a zoom: change of the logarithm of the scale


def draw_pictures(
    count: int, generator: torch.Generator, device: torch.device | str = "cpu", frame_height: int = 160
) -> Tensor:
    """Draw pictures larger than a frame, `CANVAS` heights of it.

    Args:
        generator: on the CPU.
        frame_height: pixels of the frames to be cut out of them.

    Returns:
        float32 [B, 3, H, W] in -1..1.
    """
    height, width = (round(frame_height * size / 8) * 8 for size in CANVAS)
    r = torch.rand(count, LEAVES, 16, generator=generator).to(device)
    g = torch.rand(count, 12, generator=generator).to(device)
    y = ((torch.arange(height, device=device) + 0.5) / frame_height).view(1, -1, 1)
    x = ((torch.arange(width, device=device) + 0.5) / frame_height).view(1, 1, -1)
    noise = _noise(count, 4, height, width, 1.1 + 1.1 * g[:, 0], generator, device)
    base = g[:, 1:4] * 0.8 + 0.1  # colours of one picture keep together: around its own, more or less
    spread = 0.1 + 0.4 * g[:, 4, None]
    vivid = g[:, 1:2].square().view(-1, 1, 1, 1)  # most pictures are nearly grey
    picture = base[:, :, None, None] + 0.25 * noise[:, :3]
    smallest = 0.03 + 0.05 * g[:, 5]
    kinds = g[:, 6, None] < torch.tensor([0.45, 0.75], device=device)  # boxes and discs, all boxes, or all discs
    for leaf in range(LEAVES):
        n = r[:, leaf]
        size = smallest / (1 - n[:, 0] * (1 - (smallest / 0.7).square())).sqrt()  # density of sizes as size^-3
        angle = math.pi * n[:, 1] * (g[:, 7] < 0.6)
        dx, dy = x - (n[:, 2] * CANVAS[1]).view(-1, 1, 1), y - (n[:, 3] * CANVAS[0]).view(-1, 1, 1)
        cos, sin = _plane(angle.cos()), _plane(angle.sin())
        u, v = (cos * dx + sin * dy) / _plane(0.5 + n[:, 4]), (cos * dy - sin * dx) / _plane(0.5 + n[:, 5])
        round_leaf = torch.where(kinds[:, 0], n[:, 6] < 0.5, kinds[:, 1])
        reach = torch.where(_plane(round_leaf), torch.hypot(u, v), torch.maximum(u.abs(), v.abs()))
        softness = _plane(0.6 + 3 * n[:, 7].square() * g[:, 8]) / frame_height
        cover = ((_plane(size) - reach) / softness + 0.5).clamp(0, 1).unsqueeze(1)
        colour = (base + spread * (2 * n[:, 8:11] - 1)).clamp(0.02, 0.98)[:, :, None, None]
        shade = _plane(n[:, 11] - 0.5) * (u + v) / _plane(size) * 0.3
        tone = torch.roll(noise[:, leaf % 4], (37 * leaf % height, 53 * leaf % width), (1, 2))
        texture = (_plane(0.25 * n[:, 12].square()) * tone + shade).unsqueeze(1)
        picture = torch.lerp(picture, colour + texture, cover)
    picture = torch.lerp(picture.mean(dim=1, keepdim=True), picture, 0.2 + 0.8 * vivid)
    contrast = 0.7 + 0.4 * g[:, 9, None, None, None]
    light = 1 + (_plane(g[:, 10] - 0.5) * (x / CANVAS[1] - 0.5) + _plane(g[:, 11] - 0.5) * (y / CANVAS[0] - 0.5))
    picture = (picture - 0.5) * contrast * light.unsqueeze(1) + 0.5
    return picture.clamp(0, 1).mul(2).sub(1)


def _plane(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def _noise(
    count: int, channels: int, height: int, width: int, falloff: Tensor, generator: torch.Generator,
    device: torch.device | str,
) -> Tensor:  # fmt: skip
    """Noise whose amplitude falls with frequency as f^-falloff, of standard deviation 1: [B, C, H, W]."""
    seed = int(torch.randint(2**31, (), generator=generator))
    local = torch.Generator(device).manual_seed(seed)
    white = torch.randn(count, channels, height, width, generator=local, device=device)
    fy = torch.fft.fftfreq(height, device=device).view(-1, 1) * height
    fx = torch.fft.rfftfreq(width, device=device).view(1, -1) * width
    frequency = torch.hypot(fy, fx * height / width).clamp(min=1)
    spectrum = torch.fft.rfft2(white) * frequency ** -falloff.view(-1, 1, 1, 1)
    spectrum[..., 0, 0] = 0
    field = torch.fft.irfft2(spectrum, s=(height, width))
    return field / field.std(dim=(-1, -2), keepdim=True)


def move_camera(
    pictures: Tensor, camera: Tensor, amount: Tensor, num_frames: int, height: int, width: int, view: float = 1.0
) -> Tensor:
    """Clips of a camera over still pictures; the frame in the middle of the clip shows a picture's middle.

    Args:
        pictures: [B, 3, H, W] in -1..1. Beyond their edges they go on mirrored.
        camera: [B], indices into `scenes.CAMERAS`.
        amount: [B] in 0..1, from the shortest pan or zoom to the longest.
        num_frames, height, width: of the clips.
        view: the frame's height in units of the height for which the picture was drawn, or for any other picture the
            share of its height that a frame shows times `CANVAS[0]`.

    Returns:
        [B, 3, T, height, width] in -1..1.
    """
    time = torch.linspace(-0.5, 0.5, num_frames, device=pictures.device)
    pan = (PAN[0] + (PAN[1] - PAN[0]) * amount)[:, None] * time
    zoom = (ZOOM[0] + (ZOOM[1] - ZOOM[0]) * amount)[:, None] * time

    def signed(plus: str, minus: str, way: Tensor) -> Tensor:
        sign = (camera == CAMERAS.index(plus)).float() - (camera == CAMERAS.index(minus)).float()
        return sign[:, None] * way

    pan_x, pan_y = signed("pan right", "pan left", pan), signed("pan down", "pan up", pan)
    scale = signed("zoom out", "zoom in", zoom).exp()
    rows = (torch.arange(height, device=pictures.device) + 0.5) / height - 0.5
    columns = ((torch.arange(width, device=pictures.device) + 0.5) / width - 0.5) * width / height
    in_height = 2 * view / CANVAS[0]  # grid_sample's units: the picture spans -1..1
    in_width = in_height * pictures.shape[2] / pictures.shape[3]
    y = (rows * scale[..., None] + pan_y[..., None]) * in_height
    x = (columns * scale[..., None] + pan_x[..., None]) * in_width
    grid = torch.stack(
        [x[:, :, None, :].expand(-1, -1, height, -1), y[:, :, :, None].expand(-1, -1, -1, width)], dim=-1
    )
    frames = F.grid_sample(
        pictures, grid.flatten(1, 2), mode="bilinear", padding_mode="reflection", align_corners=False
    )  # [B, 3, T * height, width]
    return frames.unflatten(2, (num_frames, height))
