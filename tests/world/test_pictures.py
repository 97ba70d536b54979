"""Pictures and the camera over them: ranges, places to the pixel, and that the judge sees which way it moves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from turbowan.world.analyse import analyse_camera
from turbowan.world.pictures import CANVAS, PAN, ZOOM, draw_pictures, move_camera
from turbowan.world.scenes import CAMERAS

pytestmark = pytest.mark.usefixtures("fresh_seed")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_seed_draws_the_same_pictures(fresh_seed: int) -> None:
    pictures = draw_pictures(3, generator(fresh_seed), frame_height=64)
    assert pictures.shape == (3, 3, 112, 160)  # 1.7 and 2.5 heights, in eighths
    assert pictures.dtype == torch.float32
    assert -1 <= pictures.min() < pictures.max() <= 1
    assert torch.equal(pictures, draw_pictures(3, generator(fresh_seed), frame_height=64))
    assert not torch.equal(pictures, draw_pictures(3, generator(fresh_seed + 1), frame_height=64))
    assert (pictures[0] - pictures[1]).abs().mean() > 0.05


def test_pictures_have_edges_and_even_parts(fresh_seed: int) -> None:
    """As photographs: most steps from pixel to pixel are small, a few large; and they fill the range of light."""
    pictures = draw_pictures(12, generator(fresh_seed), frame_height=64).mean(dim=1)
    steps = pictures.diff(dim=2).abs().flatten(1)
    assert steps.median() < 0.05  # 0.027 was seen
    assert steps.quantile(0.99, dim=1).median() > 0.25  # 0.4
    assert pictures.flatten(1).std(dim=1).min() > 0.07  # 0.15


def places(camera: Tensor, amount: Tensor, frames: int, height: int, width: int, view: float = 1.0) -> Tensor:
    """What pixels show, by a picture whose values are its coordinates: [B, 2, T, h, w], x and y from its middle, in
    heights of the frame for which it was drawn."""
    rows, columns = 340, 500
    y = ((torch.arange(rows) + 0.5) / rows - 0.5) * CANVAS[0]
    x = ((torch.arange(columns) + 0.5) / columns - 0.5) * CANVAS[1]
    picture = torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns), torch.zeros(rows, columns)])
    return move_camera(picture.expand(len(camera), -1, -1, -1), camera, amount, frames, height, width, view)[:, :2]


def test_the_frame_in_the_middle_shows_the_middle() -> None:
    """At the size for which the picture was drawn, whatever the camera does; `view` is how much of it."""
    cameras = torch.arange(len(CAMERAS))
    for view in (1.0, 0.6):
        middle = places(cameras, torch.rand(len(CAMERAS)), 9, 48, 80, view)[:, :, 4]
        x = ((torch.arange(80) + 0.5) / 80 - 0.5) * view * 80 / 48
        y = ((torch.arange(48) + 0.5) / 48 - 0.5) * view
        assert torch.allclose(middle[:, 0], x.expand(len(CAMERAS), 48, -1), atol=1e-4)
        assert torch.allclose(middle[:, 1], y[:, None].expand(len(CAMERAS), -1, 80), atol=1e-4)


@pytest.mark.parametrize("amount", [0.0, 0.4, 1.0])
def test_pans_and_zooms_go_their_way_evenly(amount: float) -> None:
    way = PAN[0] + (PAN[1] - PAN[0]) * amount
    scale = math.exp((ZOOM[0] + (ZOOM[1] - ZOOM[0]) * amount) / 2)
    for index, name in enumerate(CAMERAS):
        shown = places(torch.tensor([index]), torch.tensor([amount]), 5, 32, 32)[0]  # [2, T, 32, 32]
        middle = shown.mean(dim=(2, 3))
        moved = {"pan right": (way, 0), "pan left": (-way, 0), "pan down": (0, way), "pan up": (0, -way)}
        expected = torch.tensor(moved.get(name, (0, 0)))[:, None] * torch.linspace(-0.5, 0.5, 5)
        assert torch.allclose(middle, expected, atol=1e-3), name
        spans = shown[0, :, 0, -1] - shown[0, :, 0, 0]
        sign = {"zoom in": 1, "zoom out": -1}.get(name, 0)
        assert torch.allclose(spans, 31 / 32 * scale ** (sign * -torch.linspace(-1, 1, 5)), atol=1e-3), name


def test_beyond_its_edges_a_picture_goes_on_mirrored() -> None:
    """A frame of twice the picture's width has its middle half as it is, and the rest the other way round."""
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    whole = move_camera(picture, torch.zeros(1), torch.zeros(1), 3, 16, 32, view=CANVAS[0])[0, :, 1]
    assert torch.allclose(whole[:, :, 8:24], picture[0], atol=1e-4)
    assert torch.allclose(whole[:, :, :8], picture[0, :, :, :8].flip(2), atol=1e-4)
    assert torch.allclose(whole[:, :, 24:], picture[0, :, :, 8:].flip(2), atol=1e-4)


def test_the_judge_sees_which_way_the_camera_moves(fresh_seed: int) -> None:
    camera = torch.arange(6).repeat(8)
    pictures = draw_pictures(48, generator(fresh_seed), frame_height=64)
    amount = torch.rand(48, generator=generator(fresh_seed))
    video = move_camera(pictures, camera, amount, 9, 64, 96)
    assert video.shape == (48, 3, 9, 64, 96)
    assert -1 <= video.min() < video.max() <= 1
    right = analyse_camera(video) == camera
    assert right.float().mean() >= 0.95, [CAMERAS[i] for i in camera[~right]]
