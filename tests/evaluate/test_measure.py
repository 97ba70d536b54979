"""Measures on clips whose motion, distance and error are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from turbowan.evaluate.measure import (
    camera_travel,
    change,
    mean_distance,
    outline_travel,
    pictures_psnr,
    relative_error,
)
from turbowan.world.analyse import analyse_shapes
from turbowan.world.pictures import draw_pictures, move_camera
from turbowan.world.scenes import CAMERAS, COLOURS, MOTIONS, SHAPES, draw_scenes, render

SIZE = (33, 96, 160)


def moving_shapes(seed: int) -> Tensor:
    """A clip of every motion, the last one still: a yellow square before blue, which no flicker hides."""
    scenes = draw_scenes(len(MOTIONS), torch.Generator().manual_seed(seed), held_out=None)
    motion = torch.arange(len(MOTIONS))
    shape = torch.full_like(motion, SHAPES.index("square"))
    colour, background = (torch.full_like(motion, list(COLOURS).index(name)) for name in ("yellow", "blue"))
    return render(replace(scenes, motion=motion, shape=shape, colour=colour, background=background), *SIZE)


def travel(video: Tensor) -> Tensor:
    return outline_travel(analyse_shapes(video).mask)


def slowed(video: Tensor) -> Tensor:
    """Half of the clip in all of its time."""
    frames = video.shape[2]
    return video[:, :, : frames // 2 + 1].repeat_interleave(2, dim=2)[:, :, :frames]


def test_change_is_a_share_of_black_to_white() -> None:
    video = torch.tensor([-1.0, 1.0, 1.0]).view(1, 1, 3, 1, 1).expand(2, 3, 3, 4, 4)
    assert change(video).tolist() == [0.5, 0.5]


def test_half_the_motion_is_half_the_travel(fresh_seed: int) -> None:
    video = moving_shapes(fresh_seed)
    whole, half = travel(video), travel(slowed(video))
    assert whole[:-1].min() > 0.08
    straight = [i for i, name in enumerate(MOTIONS) if name not in ("bounce", "turn", "still")]
    assert half[straight] / whole[straight] == pytest.approx(0.5 * torch.ones(len(straight)), abs=0.09)
    assert (half[:-1] / whole[:-1]).mean() == pytest.approx(0.5, abs=0.06)


def test_flicker_changes_but_does_not_travel(fresh_seed: int) -> None:
    video = moving_shapes(fresh_seed)
    blotches = F.interpolate(torch.randn(len(video) * 33, 3, 12, 20), size=SIZE[1:], mode="bilinear")
    flickering = (video + 0.1 * blotches.unflatten(0, (-1, 33)).transpose(1, 2)).clamp(-1, 1)
    assert change(flickering).mean() > 3 * change(video).mean()
    still, moving = travel(video)[-1], travel(video)[:-1]
    assert still == 0
    assert travel(flickering)[-1] < 0.06
    assert travel(flickering)[:-1].mean() == pytest.approx(float(moving.mean()), rel=0.1)


def test_a_growing_disc_travels_as_far_as_its_radius_grows() -> None:
    frames, height, width = SIZE
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    radius = torch.linspace(0.1, 0.3, frames).view(-1, 1, 1) * height
    mask = (torch.hypot(x - width / 2, y - height / 2) < radius).float().unsqueeze(0)
    assert outline_travel(mask).item() == pytest.approx(0.2, rel=0.05)
    assert outline_travel(torch.zeros(1, *SIZE)).item() == 0


def test_camera_travel_is_the_way_of_the_camera(fresh_seed: int) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    pictures = draw_pictures(4, generator, frame_height=SIZE[1])
    camera = torch.tensor([CAMERAS.index("pan right"), CAMERAS.index("pan up")]).repeat(2)
    fast = move_camera(pictures, camera, torch.ones(4), *SIZE)  # 0.7 heights
    assert camera_travel(fast).tolist() == pytest.approx([0.7] * 4, rel=0.2)
    assert (camera_travel(slowed(fast)) / camera_travel(fast)).tolist() == pytest.approx([0.5] * 4, abs=0.1)
    soft = F.avg_pool2d(fast.flatten(0, 1), 3, stride=1, padding=1).unflatten(0, (4, 3))
    # one picture may lose 0.14 (seen once; 0.10 at most of 120 others): the mean of four is held closer
    assert (camera_travel(soft) / camera_travel(fast)).mean() == pytest.approx(1.0, abs=0.1)
    still = fast[:, :, :1].expand_as(fast)
    flicker = (still + 0.1 * torch.randn(4, 3, *SIZE)).clamp(-1, 1)
    assert camera_travel(still).max() == pytest.approx(0, abs=1e-4)
    assert camera_travel(flicker).max() < 0.05
    assert (change(flicker) > change(fast) / 2).all()


def test_distance_is_over_all_pairs() -> None:
    levels = torch.tensor([[0, 0, 255], [51, 51, 51]], dtype=torch.uint8)
    videos = levels.view(2, 3, 1, 1, 1, 1).expand(2, 3, 3, 2, 4, 4)
    assert mean_distance(videos).tolist() == pytest.approx([2 / 3, 0.0])
    steps = torch.tensor([[0, 51, 102]], dtype=torch.uint8).view(1, 3, 1, 1, 1, 1).expand(1, 3, 3, 2, 4, 4)
    assert mean_distance(steps).item() == pytest.approx((0.2 + 0.2 + 0.4) / 3)


def test_errors_are_relative_and_by_sample() -> None:
    exact = torch.randn(3, 16, 2, 4, 4)
    found = relative_error(exact * torch.tensor([1.0, 1.1, 3.0]).view(-1, 1, 1, 1, 1), exact)
    assert found.tolist() == pytest.approx([0.0, 0.1, 2.0], abs=1e-5)


def test_psnr_is_that_of_bytes() -> None:
    theirs = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    ours = theirs.clone()
    ours[1] += 5
    assert pictures_psnr(ours, theirs) == pytest.approx([106.02, 20 * math.log10(255 / 5)], abs=0.01)
