"""Clips of one coloured shape over a background, of a camera over a texture, and of collages, drawn on any device.

A `Scenes` holds a batch as tensors, so that thousands of clips are drawn at once on a GPU. Lengths are in units of the
frame's height, times in 0..1 over the whole clip, colours in 0..1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

COLOURS = {
    "red": (0.88, 0.12, 0.12),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.97, 0.90, 0.15),
    "green": (0.12, 0.65, 0.20),
    "cyan": (0.15, 0.80, 0.85),
    "blue": (0.13, 0.25, 0.88),
    "purple": (0.55, 0.15, 0.75),
    "pink": (0.97, 0.50, 0.75),
    "white": (0.95, 0.95, 0.95),
    "grey": (0.50, 0.50, 0.50),
    "black": (0.05, 0.05, 0.05),
}
SHAPES = ("circle", "square", "triangle", "ring")
MOTIONS = ("left", "right", "up", "down", "grow", "shrink", "turn", "bounce", "still")
TEXTURES = ("plain", "striped", "checkered", "dotted")
CAMERAS = ("pan left", "pan right", "pan up", "pan down", "zoom in", "zoom out")
CAMERA_TEXTURES = ("striped", "checkered", "dotted", "cloudy")
COLLAGE_LAYERS = 10

_TEXTURE_CONTRAST = 0.09  # a background's two tones lie so far above and below its colour
_COLOUR_JITTER = 0.02
_SMALL, _LARGE = 0.125, 0.2  # radius
_GROWN = (0.095, 0.25)  # radius at the ends of growing and shrinking
_PALETTE = torch.tensor(list(COLOURS.values()))


def palette(device: torch.device | str = "cpu") -> Tensor:
    """The named colours, [11, 3] in the order of `COLOURS`."""
    return _PALETTE.to(device)


def _pairs(min_distance: float) -> Tensor:
    """Pairs of colours that can be told apart: [N, 2] indices."""
    return (torch.cdist(_PALETTE, _PALETTE) > min_distance).nonzero()


@dataclass
class Scenes:
    """A batch of B scenes; integer attributes index the tuples above, the rest says what a caption leaves out.

    shape scenes use: shape, colour, motion, large, background, texture. camera scenes use: camera, colour, background
    (the texture's two colours) and texture (an index into CAMERA_TEXTURES).
    """

    is_camera: Tensor  # bool [B]
    shape: Tensor
    colour: Tensor
    motion: Tensor
    large: Tensor  # bool [B]
    background: Tensor
    texture: Tensor
    camera: Tensor
    random: Tensor  # [B, 12] uniform in 0..1: start, jitter, periods, phases

    def __len__(self) -> int:
        return self.shape.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @property
    def held_out(self) -> Tensor:
        """bool [B]: combinations of colour, shape, motion and background that training never shows, one in nine."""
        key = 2 * self.colour + 3 * self.shape + self.motion + 4 * self.background + 5 * self.texture
        return ~self.is_camera & (key % 9 == 0)


def draw_scenes(
    count: int, generator: torch.Generator, camera_share: float = 0.0, held_out: bool | None = False
) -> Scenes:
    """Draw scenes on the CPU.

    Args:
        count: B.
        camera_share: share of camera scenes, 0..1; none of these is held out.
        held_out: only training combinations (False), only held-out ones (True), or all (None).
    """
    if held_out and camera_share >= 1:
        raise ValueError("no camera scene is held out")

    def integers(high: int, n: int) -> Tensor:
        return torch.randint(high, (n,), generator=generator)

    pairs = _pairs(0.5)
    drawn = 16 * count + 64 if held_out else 2 * count + 64
    pair = pairs[integers(len(pairs), drawn)]
    shape, motion = integers(len(SHAPES), drawn), integers(len(MOTIONS), drawn)
    round_shape = (shape == SHAPES.index("circle")) | (shape == SHAPES.index("ring"))
    scenes = Scenes(
        is_camera=torch.rand(drawn, generator=generator) < camera_share,
        shape=shape,
        colour=pair[:, 0],
        motion=motion,
        large=integers(2, drawn).bool(),
        background=pair[:, 1],
        texture=integers(len(TEXTURES), drawn),
        camera=integers(len(CAMERAS), drawn),
        random=torch.rand(drawn, 12, generator=generator),
    )
    possible = scenes.is_camera | ~(round_shape & (motion == MOTIONS.index("turn")))  # a turning circle looks still
    if held_out is not None:
        possible &= scenes.held_out == held_out
    kept = scenes[possible.nonzero()[:count, 0]]
    if len(kept) == count:
        return kept
    more = draw_scenes(count - len(kept), generator, camera_share, held_out)  # rarely: too few were possible
    return Scenes(**{f.name: torch.cat([getattr(kept, f.name), getattr(more, f.name)]) for f in fields(kept)})


def render(
    scenes: Scenes,
    num_frames: int,
    height: int,
    width: int,
    window: tuple[int, int, int, int] | None = None,
    frames: slice | None = None,
) -> Tensor:
    """Draw the clips on the scenes' device.

    Args:
        num_frames, height, width: the whole clip's size.
        window: (top, left, height, width) in pixels: draw only this part of every frame.
        frames: draw only these frames of the clip.

    Returns:
        float32 [B, 3, T, H, W] in -1..1.
    """
    device = scenes.shape.device
    top, left, rows, columns = window or (0, 0, height, width)
    y = (torch.arange(top, top + rows, device=device) + 0.5) / height
    x = (torch.arange(left, left + columns, device=device) + 0.5) / height
    time = torch.linspace(0, 1, num_frames, device=device)[frames or slice(None)]
    x, y = x.view(1, 1, 1, -1), y.view(1, 1, -1, 1)
    time = time.view(1, -1, 1, 1)
    video = torch.empty(len(scenes), 3, time.shape[1], rows, columns, device=device)
    camera = scenes.is_camera
    for rows_of, draw in ((~camera, _shape_scene), (camera, _camera_scene)):
        if rows_of.any():
            video[rows_of] = draw(scenes[rows_of], x, y, time, height, width / height)
    return video.mul_(2).sub_(1).clamp_(-1, 1)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _jittered(scenes: Scenes, index: Tensor, columns: slice) -> Tensor:
    jitter = (scenes.random[:, columns] - 0.5) * 2 * _COLOUR_JITTER
    return (palette(index.device)[index] + jitter).clamp(0.02, 0.98)


def _shape_scene(scenes: Scenes, x: Tensor, y: Tensor, time: Tensor, height: int, aspect: float) -> Tensor:
    """[B, 3, T, H, W] in 0..1."""
    r = scenes.random
    motion = {name: _column(scenes.motion == i) for i, name in enumerate(MOTIONS)}
    radius = _column(torch.where(scenes.large, _LARGE, _SMALL) * (0.94 + 0.12 * r[:, 0]))
    ramp = torch.where(motion["shrink"], 1 - time, time)
    changing = motion["grow"] | motion["shrink"]
    size = torch.where(changing, _GROWN[0] + (_GROWN[1] - _GROWN[0]) * ramp, radius)

    reach = torch.where(changing, _GROWN[1], radius) * 1.25 + 0.03  # stays this far from the edges
    sideways, upright = motion["left"] | motion["right"], motion["up"] | motion["down"]
    room_x, room_y = (aspect - 2 * reach).clamp(min=0), (1 - 2 * reach).clamp(min=0)
    swing = 0.5 * (0.7 + 0.3 * _column(r[:, 1])) * room_y.clamp(max=0.5)  # half the height of a bounce
    travel_x = torch.where(sideways, (0.55 + 0.35 * _column(r[:, 1])) * room_x, 0.0)
    travel_y = torch.where(upright, (0.7 + 0.3 * _column(r[:, 1])) * room_y, 0.0)
    margin_y = torch.where(motion["bounce"], swing, travel_y / 2)
    centre_x = reach + travel_x / 2 + _column(r[:, 2]) * (room_x - travel_x)
    centre_y = reach + margin_y + _column(r[:, 3]) * (room_y - 2 * margin_y).clamp(min=0)
    sign_x = torch.where(motion["left"], -1.0, 1.0)
    sign_y = torch.where(motion["up"], -1.0, 1.0)
    cycles = 1.5 + 0.5 * _column(r[:, 4])
    bounce = torch.where(motion["bounce"], swing * torch.sin(2 * math.pi * cycles * time), 0.0)
    angle = torch.where(motion["turn"], (2.2 + 1.2 * _column(r[:, 4])) * time, 0.0)  # radians
    angle = angle * torch.where(_column(r[:, 5]) < 0.5, -1.0, 1.0)

    dx = x - (centre_x + sign_x * travel_x * (time - 0.5))
    dy = y - (centre_y + sign_y * travel_y * (time - 0.5) - bounce)
    cos, sin = angle.cos(), angle.sin()
    distance = _signed_distance(_column(scenes.shape), cos * dx + sin * dy, cos * dy - sin * dx, size)
    cover = (0.5 - distance * height).clamp(0, 1).unsqueeze(1)

    tone = _pattern(_column(scenes.texture), TEXTURES, x, y, r[:, 6:10]) * _TEXTURE_CONTRAST
    background = _jittered(scenes, scenes.background, slice(9, 12))[:, :, None, None, None] + tone.unsqueeze(1)
    foreground = _jittered(scenes, scenes.colour, slice(6, 9))[:, :, None, None, None]
    return torch.lerp(background.expand(-1, -1, cover.shape[2], -1, -1), foreground, cover)


def _signed_distance(shape: Tensor, x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    """Distance to the shape's outline, negative inside. Sizes are scaled so that all shapes look about as large."""
    length = torch.hypot(x, y)
    square = torch.maximum(x.abs(), y.abs()) - 0.88 * size
    slant = 0.5 * y.neg() + 0.8660254 * x.abs()  # an equilateral triangle that points up, centred on its centroid
    triangle = torch.maximum(slant, y) - 0.66 * size
    ring = (length - 0.78 * size).abs() - 0.26 * size
    out = torch.where(shape == SHAPES.index("square"), square, length - size)
    out = torch.where(shape == SHAPES.index("triangle"), triangle, out)
    return torch.where(shape == SHAPES.index("ring"), ring, out)


def _pattern(texture: Tensor, names: tuple[str, ...], x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Texture tone in -1..1; r: [B, 4] uniform numbers for period, phases and orientation."""
    a, b, c, d = (_column(r[:, i]) for i in range(4))
    sharpness = 12.0

    def edge(wave: Tensor) -> Tensor:
        return (wave * sharpness).clamp(-1, 1)

    def wave(u: Tensor, period: Tensor, phase: Tensor) -> Tensor:
        return torch.sin(2 * math.pi * (u / period + phase)) / (2 * math.pi) * period * 8  # slope 8 at the zeros

    out = torch.zeros_like(a)
    for index, name in enumerate(names):
        if name == "plain":
            continue
        if name == "striped":
            tone = edge(wave(torch.where(d < 0.5, x, y), 0.14 + 0.10 * a, b))
        elif name == "checkered":
            period = 0.20 + 0.10 * a
            tone = edge(wave(x, period, b)) * edge(wave(y, period, c))
        elif name == "dotted":
            pitch = 0.15 + 0.08 * a
            u, v = ((s / pitch + p).frac() - 0.5 for s, p in ((x + 2, b), (y + 2, c)))
            tone = ((0.3 - torch.hypot(u, v)) * pitch * 8 * sharpness).clamp(-1, 1)
        else:
            tone = _clouds(x, y, r)
        out = torch.where(texture == index, tone, out)
    return out


def _clouds(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Smooth noise: waves of many directions, the longer the stronger."""
    total = torch.zeros_like(_column(r[:, 0]))
    seed = (r * 997).sum(dim=1)
    for i in range(10):
        turn = _column((0.618 * (seed + i)).frac())  # spread evenly: a pan along the waves of one direction is not seen
        direction, phase = 2 * math.pi * turn, 2 * math.pi * _column((seed * (0.889 + 0.137 * i)).frac())
        frequency = 1.2 * 1.33**i
        along = x * direction.cos() + y * direction.sin()
        total = total + torch.sin(2 * math.pi * frequency * along + phase) * frequency**-0.7
    return total.mul(0.6).tanh()


def _camera_scene(scenes: Scenes, x: Tensor, y: Tensor, time: Tensor, height: int, aspect: float) -> Tensor:
    """[B, 3, T, H, W] in 0..1: a texture of two colours under a moving camera."""
    r = scenes.random
    camera = {name: _column(scenes.camera == i) for i, name in enumerate(CAMERAS)}
    distance = (0.35 + 0.35 * _column(r[:, 0])) * (time - 0.5)
    pan_x = torch.where(camera["pan right"], distance, torch.where(camera["pan left"], -distance, 0.0))
    pan_y = torch.where(camera["pan down"], distance, torch.where(camera["pan up"], -distance, 0.0))
    zoom = (0.45 + 0.35 * _column(r[:, 0])) * (time - 0.5)
    scale = torch.where(camera["zoom in"], -zoom, torch.where(camera["zoom out"], zoom, 0.0)).exp()
    u = (x - aspect / 2) * scale + pan_x
    v = (y - 0.5) * scale + pan_y
    pattern = r[:, 1:5].clone()  # stripes lie across a pan: along it, nothing would be seen to move
    pattern[(camera["pan left"] | camera["pan right"]).flatten(), 3] = 0.0
    pattern[(camera["pan up"] | camera["pan down"]).flatten(), 3] = 1.0
    tone = _pattern(_column(scenes.texture), CAMERA_TEXTURES, u, v, pattern)
    mix = (tone * 0.5 + 0.5).unsqueeze(1)
    low = _jittered(scenes, scenes.background, slice(9, 12))[:, :, None, None, None]
    high = _jittered(scenes, scenes.colour, slice(6, 9))[:, :, None, None, None]
    return torch.lerp(low, high, mix)


def render_collage(
    count: int, num_frames: int, height: int, width: int, generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """Heaps of shapes of any colour over noise, under a moving camera: what keeps the VAE general.

    Returns:
        float32 [B, 3, T, H, W] in -1..1, no caption.
    """
    aspect = width / height
    time = torch.linspace(-0.5, 0.5, num_frames, device=device).view(1, -1, 1, 1)
    y = ((torch.arange(height, device=device) + 0.5) / height).view(1, 1, -1, 1)
    x = ((torch.arange(width, device=device) + 0.5) / height).view(1, 1, 1, -1)
    r = torch.rand(count, 8 + 10 * COLLAGE_LAYERS, generator=generator).to(device)
    scale = ((_column(r[:, 0]) - 0.5) * time).exp()
    u = (x - aspect / 2) * scale + (_column(r[:, 1]) - 0.5) * time + aspect / 2
    v = (y - 0.5) * scale + (_column(r[:, 2]) - 0.5) * time + 0.5
    tone = _clouds(u, v, r[:, 3:7]).unsqueeze(1)
    video = (0.5 + 0.35 * tone * (r[:, 3:6, None, None, None] * 2 - 1)).clamp(0, 1)
    for layer in range(COLLAGE_LAYERS):
        n = r[:, 8 + 10 * layer : 18 + 10 * layer]
        angle = _column(n[:, 0]) * 6.28 + (_column(n[:, 1]) - 0.5) * 3 * time
        dx = u - _column(n[:, 2]) * aspect - (_column(n[:, 3]) - 0.5) * 0.5 * time
        dy = v - _column(n[:, 4])
        shape = _column((n[:, 5] * len(SHAPES)).long())
        cos, sin = angle.cos(), angle.sin()
        distance = _signed_distance(
            shape, cos * dx + sin * dy, cos * dy - sin * dx, 0.04 + 0.22 * _column(n[:, 6]).square()
        )
        cover = (0.5 - distance * height / scale).clamp(0, 1).unsqueeze(1)
        video = torch.lerp(video, n[:, 7:10, None, None, None] + 0.12 * tone, cover)
    return video.mul_(2).sub_(1).clamp_(-1, 1)
