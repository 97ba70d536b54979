"""What a clip shows, by plain image analysis: colour, shape, motion, background. No network, no caption.

Works on batches on any device. Distances are in units of the frame's height.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .scenes import CAMERAS, MOTIONS, SHAPES, TEXTURES, Scenes, palette

SCALED = math.log(1.45)  # a shape that grows or shrinks less than this keeps its size
TRAVELLED = 0.12  # a centroid that ends nearer than this to its start has not moved away
CORE = 0.0125  # pixels further inside a shape than this are surely its own: 2 pixels of 160
ROUND = 0.80  # of its circumscribed circle a disc fills more, a square less (1 and 2 / pi, were there no pixels)
THREE_CORNERS = 0.4  # half of a triangle's third moment
HOLLOW = 0.5  # share of a ring's middle that is empty
LAG = 0.1875  # of a clip: 6 of 32 frames. A shape that turns does so visibly, by less than a quarter
TURNED = 0.06  # share of a resting shape's mask that must change in that time when it turns


@dataclass
class Findings:
    """Per clip: indices into SHAPES, COLOURS, MOTIONS, TEXTURES, or CAMERAS; `visible` says a shape was found.

    mask: where it is, float [B, T, H, W], 1 inside and 0 outside.
    """

    visible: Tensor
    shape: Tensor
    colour: Tensor
    motion: Tensor
    background: Tensor
    texture: Tensor
    mask: Tensor


def analyse_shapes(video: Tensor) -> Findings:
    """Judge clips of one shape over a still background.

    Args:
        video: [B, 3, T, H, W] in -1..1, with at least 4 frames.
    """
    pixels = (video.float() * 0.5 + 0.5).clamp(0, 1)
    mask = _foreground(pixels, _border_tones(pixels))
    colours = palette(video.device)
    area = mask.sum(dim=(2, 3)) / mask.shape[2] ** 2  # [B, T]
    visible = (area > 0.002).float().mean(dim=1) > 0.9
    x, y = _centroids(mask)

    core = _shrink(mask, CORE)
    weight = torch.where(core.sum(dim=(1, 2, 3), keepdim=True) > 0, core, mask).unsqueeze(1)
    colour = (pixels * weight).sum(dim=(2, 3, 4)) / weight.sum(dim=(2, 3, 4)).clamp(min=1)
    background, texture = _background(pixels, mask)
    return Findings(
        visible=visible,
        shape=_shape(mask, area, x, y),
        colour=torch.cdist(colour, colours).argmin(dim=1),
        motion=_motion(mask, area, x, y),
        background=torch.cdist(background, colours).argmin(dim=1),
        texture=texture,
        mask=mask,
    )


def _border_tones(pixels: Tensor) -> Tensor:
    """The two colours, lighter and darker, of the frame's outer pixels: [2, B, 3]. Equal on a plain background."""
    n = 6
    strips = [pixels[..., :n, :], pixels[..., -n:, :], pixels[..., :n].mT, pixels[..., -n:].mT]
    border = torch.cat([s.flatten(2) for s in strips], dim=2)
    grey = border.mean(dim=1, keepdim=True)
    light = (grey >= grey.mean(dim=2, keepdim=True)).float()
    tones = [(border * w).sum(dim=2) / w.sum(dim=2).clamp(min=1) for w in (light, 1 - light)]
    share = light.mean(dim=2)
    return torch.stack([torch.where(share < 0.02, tones[1], tones[0]), torch.where(share > 0.98, tones[0], tones[1])])


def _foreground(pixels: Tensor, tones: Tensor) -> Tensor:
    """Mask of the shape, float [B, T, H, W]: what differs from both border tones half as much as the shape does."""
    lighter, darker = ((pixels - tone[:, :, None, None, None]).square().sum(dim=1) for tone in tones)
    distance = F.avg_pool2d(torch.minimum(lighter, darker).sqrt(), 3, stride=1, padding=1)
    strongest = distance[:, ::4, ::2, ::2].flatten(1).sort(dim=1).values
    strongest = strongest[:, int(0.99 * strongest.shape[1])]
    mask = (distance > (0.5 * strongest).clamp(min=0.2)[:, None, None, None]).float()
    core = _shrink(mask, CORE)
    return mask * _grow(core, 3 * CORE)  # specks away from any solid part are dropped


def _shrink(mask: Tensor, reach: float) -> Tensor:
    return 1 - _grow(1 - mask, reach)


def _grow(mask: Tensor, reach: float) -> Tensor:
    """The mask and all pixels up to `reach` beside it in x and y; rows and columns in turn are several times faster."""
    n = max(1, round(reach * mask.shape[2]))
    rows = F.max_pool2d(mask, (1, 2 * n + 1), stride=1, padding=(0, n))
    return F.max_pool2d(rows, (2 * n + 1, 1), stride=1, padding=(n, 0))


def _grid(mask: Tensor) -> tuple[Tensor, Tensor]:
    height, width = mask.shape[-2:]
    y = (torch.arange(height, device=mask.device) + 0.5) / height
    x = (torch.arange(width, device=mask.device) + 0.5) / height
    return x.view(1, 1, 1, -1), y.view(1, 1, -1, 1)


def _centroids(mask: Tensor) -> tuple[Tensor, Tensor]:
    x, y = _grid(mask)
    total = mask.sum(dim=(2, 3)).clamp(min=1)
    return (mask * x).sum(dim=(2, 3)) / total, (mask * y).sum(dim=(2, 3)) / total


def _shape(mask: Tensor, area: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A ring has an empty middle, a triangle three corners; a circle fills more of its circumscribed circle than a
    square.

    Three corners show in the third moment of the mask as complex numbers, |mean (dx + i dy)^3| / mean(r^2)^1.5: 0.8 for
    an equilateral triangle, 0 for whatever looks the same upside down. It changes little when blur rounds the corners.
    """
    grid_x, grid_y = _grid(mask)
    dx, dy = grid_x - x[:, :, None, None], grid_y - y[:, :, None, None]
    r2 = dx.square() + dy.square()

    def mean(values: Tensor) -> Tensor:
        return (mask * values).sum(dim=(2, 3)) / mask.sum(dim=(2, 3)).clamp(min=1)

    third = torch.hypot(mean(dx * (r2 - 4 * dy.square())), mean(dy * (4 * dx.square() - r2)))
    corners = third / mean(r2).clamp(min=1e-6) ** 1.5
    radius = (r2 * mask).amax(dim=(2, 3)).sqrt() + 0.5 / mask.shape[2]
    middle = (r2 < (0.3 * radius[:, :, None, None]).square()).float()
    hollow = 1 - (mask * middle).sum(dim=(2, 3)) / middle.sum(dim=(2, 3)).clamp(min=1)
    fill = area / (math.pi * radius.square()).clamp(min=1e-6)

    shape = torch.full_like(mask[:, 0, 0, 0], SHAPES.index("square"), dtype=torch.long)
    shape[fill.median(dim=1).values > ROUND] = SHAPES.index("circle")
    shape[corners.median(dim=1).values > THREE_CORNERS] = SHAPES.index("triangle")
    shape[hollow.median(dim=1).values > HOLLOW] = SHAPES.index("ring")
    return shape


def _motion(mask: Tensor, area: Tensor, x: Tensor, y: Tensor) -> Tensor:
    ends = max(1, mask.shape[1] // 10)

    def change(values: Tensor) -> Tensor:
        return values[:, -ends:].mean(dim=1) - values[:, :ends].mean(dim=1)

    dx, dy, scale = change(x), change(y), change(area.clamp(min=1e-4).log()) / 2
    span = y.amax(dim=1) - y.amin(dim=1)
    smooth = F.avg_pool1d(y.unsqueeze(1), 3, stride=1).squeeze(1)
    step = smooth.diff(dim=1)
    path = step.abs().sum(dim=1)
    lag = max(1, round(LAG * (mask.shape[1] - 1)))
    overlap = (mask[:, lag:] * mask[:, :-lag]).sum(dim=(2, 3))
    union = torch.maximum(mask[:, lag:], mask[:, :-lag]).sum(dim=(2, 3)).clamp(min=1)
    changed = 1 - (overlap / union).median(dim=1).values

    motion = torch.full_like(dx, MOTIONS.index("still"), dtype=torch.long)
    motion[changed > TURNED] = MOTIONS.index("turn")
    motion[(span > TRAVELLED) & (path > 1.6 * dy.abs())] = MOTIONS.index("bounce")
    straight = motion != MOTIONS.index("bounce")
    sideways, upright = dx.abs() > TRAVELLED, straight & (dy.abs() > TRAVELLED) & (dy.abs() >= dx.abs())
    motion[sideways & (dx < 0)] = MOTIONS.index("left")
    motion[sideways & (dx > 0)] = MOTIONS.index("right")
    motion[upright & (dy < 0)] = MOTIONS.index("up")
    motion[upright & (dy > 0)] = MOTIONS.index("down")
    motion[scale > SCALED] = MOTIONS.index("grow")
    motion[scale < -SCALED] = MOTIONS.index("shrink")
    return motion


def _background(pixels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Colour [B, 3] and texture index [B] of what the shape does not cover."""
    clear = 1 - _grow(mask, 2 * CORE)
    seen = clear.sum(dim=1)  # [B, H, W]
    picture = (pixels * clear.unsqueeze(1)).sum(dim=2) / seen.clamp(min=1).unsqueeze(1)
    known = (seen > 0).float()
    count = known.sum(dim=(1, 2)).clamp(min=1)
    colour = (picture * known.unsqueeze(1)).sum(dim=(2, 3)) / count[:, None]
    tone = (picture.mean(dim=1) - colour.mean(dim=1)[:, None, None]) * known

    variance = tone.square().sum(dim=(1, 2)) / count
    skew = (tone**3).sum(dim=(1, 2)) / count / variance.clamp(min=1e-8) ** 1.5
    columns = tone.sum(dim=1) / known.sum(dim=1).clamp(min=1)
    rows = tone.sum(dim=2) / known.sum(dim=2).clamp(min=1)
    one_way = torch.maximum(columns.square().mean(dim=1), rows.square().mean(dim=1)) / variance.clamp(min=1e-8)
    texture = torch.full_like(variance, TEXTURES.index("checkered"), dtype=torch.long)
    texture[skew > 0.5] = TEXTURES.index("dotted")
    texture[one_way > 0.6] = TEXTURES.index("striped")
    texture[variance < 0.025**2] = TEXTURES.index("plain")
    return colour, texture


def analyse_camera(video: Tensor) -> Tensor:
    """Which way the camera moves in clips without a moving thing: [B] indices into CAMERAS.

    Args:
        video: [B, 3, T, H, W] in -1..1.
    """
    flow = camera_flow(video)
    strongest = flow.abs().argmax(dim=1)
    positive = flow.gather(1, strongest[:, None]).squeeze(1) > 0
    names = (("pan right", "pan left"), ("pan down", "pan up"), ("zoom out", "zoom in"))  # content right: camera left
    table = torch.tensor([[CAMERAS.index(n) for n in pair] for pair in names], device=video.device)
    return table[strongest, positive.long()]


def camera_flow(video: Tensor) -> Tensor:
    """How the picture moves from frame to frame, on average over the clip: [B, 3] to the right, down, and outward.

    Solves for one shift and one scale per clip that explain the change from frame to frame (Lucas and Kanade 1981);
    what flickers without moving hardly counts. Outward is what the scale moves a pixel 0.7 heights from the middle.

    Args:
        video: [B, 3, T, H, W] in -1..1.
    """
    batch, height, width = video.shape[0], video.shape[3], video.shape[4]
    grey = video.float().mean(dim=1)
    grey = F.avg_pool2d(grey, 4)
    x = (torch.arange(grey.shape[3], device=video.device) + 0.5) * 4 / height - width / height / 2
    y = (torch.arange(grey.shape[2], device=video.device) + 0.5) * 4 / height - 0.5
    middle = (grey[:, 1:] + grey[:, :-1]) / 2
    slope_x = torch.gradient(middle, spacing=4 / height, dim=3)[0]
    slope_y = torch.gradient(middle, spacing=4 / height, dim=2)[0]
    outward = slope_x * x.view(1, 1, 1, -1) + slope_y * y.view(1, 1, -1, 1)
    terms = torch.stack([slope_x, slope_y, outward], dim=-1).reshape(batch, -1, 3)
    later = (grey[:, 1:] - grey[:, :-1]).reshape(batch, -1, 1)
    normal = terms.mT @ terms + 1e-6 * torch.eye(3, device=video.device)
    flow = torch.linalg.solve(normal, -(terms.mT @ later)).squeeze(-1)
    return flow * torch.tensor([1.0, 1.0, 0.7], device=video.device)


def matches(found: Findings, scenes: Scenes) -> dict[str, Tensor]:
    """Per clip and attribute whether the findings are the scene's: bool [B] under colour, shape, direction, background.

    A background is right when its colour and its texture are.
    """
    return {
        "colour": found.visible & (found.colour == scenes.colour),
        "shape": found.visible & (found.shape == scenes.shape),
        "direction": found.visible & (found.motion == scenes.motion),
        "background": (found.background == scenes.background) & (found.texture == scenes.texture),
    }


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio, in dB, of a mean squared error on the scale -1..1."""
    return 10 * math.log10(4.0 / max(mse, 1e-10))
