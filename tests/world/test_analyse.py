"""The judge: right on every clip of the world, wrong on every clip that shows something else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from turbowan.world.analyse import analyse_camera, analyse_shapes, matches
from turbowan.world.scenes import (
    CAMERA_TEXTURES,
    CAMERAS,
    COLOURS,
    MOTIONS,
    SHAPES,
    TEXTURES,
    Scenes,
    draw_scenes,
    render,
)

SMALL = (17, 96, 160)
POINTS = ("colour", "shape", "direction", "background")


def draw(count: int, seed: int, camera_share: float = 0.0) -> Scenes:
    return draw_scenes(count, torch.Generator().manual_seed(seed), camera_share, held_out=None)


def batches(scenes: Scenes, size: tuple[int, int, int] = SMALL) -> Iterator[tuple[Scenes, Tensor]]:
    for start in range(0, len(scenes), 8):
        part = scenes[start : start + 8]
        yield part, render(part, *size)


def judge(scenes: Scenes, size: tuple[int, int, int] = SMALL) -> dict[str, Tensor]:
    found = [matches(analyse_shapes(video), part) for part, video in batches(scenes, size)]
    return {point: torch.cat([f[point] for f in found]) for point in POINTS}


def describe(scenes: Scenes, i: int) -> str:
    colours = list(COLOURS)
    thing = f"{colours[scenes.colour[i]]} {SHAPES[scenes.shape[i]]} {MOTIONS[scenes.motion[i]]}"
    return f"{thing} on {colours[scenes.background[i]]} {TEXTURES[scenes.texture[i]]}"


def assert_all_right(scenes: Scenes, right: dict[str, Tensor]) -> None:
    wrong = {p: [describe(scenes, i) for i in (~right[p]).nonzero()[:, 0].tolist()] for p in POINTS}
    assert not any(wrong.values()), wrong


# Right on what is right


def test_every_shape_motion_and_background_is_recognised(fresh_seed: int) -> None:
    kinds = [
        (SHAPES.index(s), MOTIONS.index(m), TEXTURES.index(t))
        for s, m, t in product(SHAPES, MOTIONS, TEXTURES)
        if not (m == "turn" and s in ("circle", "ring"))
    ]
    shape, motion, texture = torch.tensor(kinds).unbind(1)
    scenes = replace(draw(len(kinds), fresh_seed), shape=shape, motion=motion, texture=texture)
    assert_all_right(scenes, judge(scenes))


def test_every_pair_of_colours_is_recognised(fresh_seed: int) -> None:
    drawn = draw(4000, fresh_seed)
    _, first = torch.unique(drawn.colour * len(COLOURS) + drawn.background, return_inverse=True)
    rows = torch.stack([(first == pair).nonzero()[0, 0] for pair in range(int(first.max()) + 1)])
    scenes = drawn[rows]
    assert len(scenes) > 80
    assert_all_right(scenes, judge(scenes, (7, 96, 160)) | {"direction": torch.ones(len(scenes), dtype=torch.bool)})


@pytest.mark.parametrize(("count", "size"), [(4, (33, 160, 256)), (2, (9, 320, 512)), (32, (13, 64, 96))])
def test_other_sizes(fresh_seed: int, count: int, size: tuple[int, int, int]) -> None:
    scenes = draw(count, fresh_seed)
    assert_all_right(scenes, judge(scenes, size))


@pytest.mark.parametrize("frames", [9, 13, 33, 49])
def test_turning_is_seen_at_any_speed(fresh_seed: int, frames: int) -> None:
    """Also at the fastest, which turns a square onto itself within half a clip."""
    scenes = draw(16, fresh_seed)
    shape = torch.where(torch.arange(16) < 8, SHAPES.index("square"), SHAPES.index("triangle"))
    scenes = replace(scenes, shape=shape, motion=torch.full((16,), MOTIONS.index("turn")))
    scenes.random[:, 4] = torch.linspace(0, 1, 8).repeat(2)
    assert_all_right(scenes, judge(scenes, (frames, 80, 128)))


@pytest.mark.parametrize("texture", CAMERA_TEXTURES)
def test_cameras(fresh_seed: int, texture: str) -> None:
    camera = torch.arange(2 * len(CAMERAS)) % len(CAMERAS)
    textures = torch.full_like(camera, CAMERA_TEXTURES.index(texture))
    scenes = replace(draw(len(camera), fresh_seed, 1.0), camera=camera, texture=textures)
    for part, video in batches(scenes):
        assert analyse_camera(video).tolist() == part.camera.tolist()
        backwards = analyse_camera(video.flip(2))  # left becomes right, up down, in out
        assert [CAMERAS[i] for i in backwards] == [CAMERAS[i ^ 1] for i in part.camera.tolist()]


def test_shapes_are_still_recognised_with_soft_edges(fresh_seed: int) -> None:
    """Corners rounded by a blur of a shape's eighth do not turn triangles into squares, nor squares into circles."""
    scenes = draw(32, fresh_seed)
    scenes = replace(scenes, shape=torch.arange(32) % 4, motion=torch.full((32,), MOTIONS.index("left")))
    taps = torch.exp(-(torch.arange(-6, 7) ** 2) / (2 * 1.8**2))
    kernel = (taps / taps.sum()).view(1, 1, -1, 1)
    found = []
    for _, video in batches(scenes):
        flat = F.pad(video.transpose(1, 2).flatten(0, 2).unsqueeze(1), (6, 6, 6, 6), mode="replicate")
        soft = F.conv2d(F.conv2d(flat, kernel), kernel.mT).view(video.transpose(1, 2).shape).transpose(1, 2)
        found.append(analyse_shapes(soft + 0.03 * torch.randn_like(soft)).shape)
    wrong = (torch.cat(found) != scenes.shape).nonzero()[:, 0].tolist()
    assert not wrong, [(describe(scenes, i), SHAPES[torch.cat(found)[i]]) for i in wrong]


# Wrong on what is wrong

OTHER = {
    "colour": ("colour", len(COLOURS)), "shape": ("shape", len(SHAPES)), "direction": ("motion", len(MOTIONS)),
    "background": ("background", len(COLOURS)), "texture": ("texture", len(TEXTURES)),
}  # fmt: skip


def test_each_attribute_counts(fresh_seed: int) -> None:
    """A caption wrong in one thing only is wrong on just that point."""
    scenes = draw(12, fresh_seed)
    found = [(part, analyse_shapes(video)) for part, video in batches(scenes)]
    for attribute, (name, size) in OTHER.items():
        point = "background" if attribute == "texture" else attribute
        for part, findings in found:
            for step in range(1, size):
                said = replace(part, **{name: (getattr(part, name) + step) % size})
                right = matches(findings, said)
                assert not right.pop(point).any(), (attribute, step)
                assert all(values.all() for values in right.values())


def test_captions_of_other_clips_are_right_by_chance_only(fresh_seed: int) -> None:
    scenes = draw(96, fresh_seed)
    found = [analyse_shapes(video) for _, video in batches(scenes)]
    right: dict[str, list[bool]] = {point: [] for point in POINTS}
    everything = 0
    for shift in range(1, len(scenes)):
        said = scenes[(torch.arange(len(scenes)) + shift) % len(scenes)]
        for start, findings in zip(range(0, len(scenes), 8), found, strict=True):
            points = matches(findings, said[start : start + 8])
            everything += int(torch.stack(list(points.values())).all(dim=0).sum())
            for point, values in points.items():
                right[point] += values.tolist()
    total = len(right["shape"])
    for point, chance in (("colour", 1 / 11), ("shape", 1 / 4), ("direction", 1 / 9), ("background", 1 / 44)):
        assert sum(right[point]) / total == pytest.approx(chance, rel=0.6), point
    assert everything / total < 0.004


def test_reversed_clips_move_the_other_way(fresh_seed: int) -> None:
    opposite = {"left": "right", "up": "down", "grow": "shrink"}
    opposite |= {b: a for a, b in opposite.items()}
    scenes = draw(18, fresh_seed)
    scenes = replace(scenes, shape=torch.full((18,), SHAPES.index("square")), motion=torch.arange(18) % len(MOTIONS))
    for part, video in batches(scenes):
        seen = analyse_shapes(video.flip(2)).motion
        for motion, backwards in zip(part.motion.tolist(), seen.tolist(), strict=True):
            name = MOTIONS[motion]
            assert MOTIONS[backwards] == opposite.get(name, name)


@pytest.mark.parametrize("kind", ["grey", "noise", "half", "background"])
def test_clips_without_a_shape_are_not_right(fresh_seed: int, kind: str) -> None:
    scenes = draw(8, fresh_seed)
    video = {
        "grey": torch.zeros(8, 3, *SMALL),
        "noise": torch.rand(8, 3, *SMALL) * 2 - 1,
        "half": render(scenes, *SMALL).clone(),
        "background": render(scenes, *SMALL)[..., :1, :1].expand(-1, -1, *SMALL).clone(),
    }[kind]
    if kind == "half":  # the shape is gone from the second half of the clip
        video[:, :, SMALL[0] // 2 :] = video[:, :, :, :1, :1][:, :, SMALL[0] // 2 :]
    right = matches(analyse_shapes(video), scenes)
    assert not torch.stack(list(right.values())).all(dim=0).any()


def test_findings_do_not_depend_on_the_batch(fresh_seed: int) -> None:
    scenes = draw(5, fresh_seed)
    video = render(scenes, *SMALL)
    whole = analyse_shapes(video)
    for i in range(5):
        alone = analyse_shapes(video[i : i + 1])
        for name in ("visible", "shape", "colour", "motion", "background", "texture"):
            assert getattr(alone, name)[0] == getattr(whole, name)[i]
