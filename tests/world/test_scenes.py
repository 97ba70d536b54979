"""The procedural world: which scenes exist, which are held out, and that they look as they say."""

from __future__ import annotations

from dataclasses import fields
from itertools import combinations

import pytest
import torch
from torch import Tensor

from turbowan.world.scenes import (
    CAMERA_TEXTURES,
    CAMERAS,
    COLOURS,
    MOTIONS,
    SHAPES,
    TEXTURES,
    Scenes,
    draw_scenes,
    palette,
    render,
    render_collage,
)

VALUES = {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS, "background": COLOURS, "texture": TEXTURES}
SIZES = {name: len(values) for name, values in VALUES.items()}
TURN = MOTIONS.index("turn")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def combination(scenes: Scenes, names: tuple[str, ...]) -> Tensor:
    """One number per scene and combination of attributes."""
    key = torch.zeros(len(scenes), dtype=torch.long)
    for name in names:
        key = key * SIZES[name] + getattr(scenes, name)
    return key


def every_scene() -> Scenes:
    """Each combination of the five attributes once, possible or not."""
    grid = torch.cartesian_prod(*(torch.arange(n) for n in SIZES.values()))
    n = len(grid)
    values = dict(zip(SIZES, grid.unbind(1), strict=True))
    zeros = torch.zeros(n, dtype=torch.long)
    return Scenes(is_camera=zeros.bool(), large=zeros.bool(), camera=zeros, random=torch.rand(n, 12), **values)


# Held out


def test_training_never_shows_a_held_out_combination(fresh_seed: int) -> None:
    training = draw_scenes(300_000, generator(fresh_seed), camera_share=0.1, held_out=False)
    training = training[~training.is_camera]
    judged = draw_scenes(30_000, generator(fresh_seed + 1), held_out=True)
    seen, kept = (combination(s, tuple(SIZES)).unique() for s in (training, judged))
    assert len(seen) > 9_000  # of about 11,900 that are possible and not held out
    assert len(kept) > 1_400
    assert not torch.isin(kept, seen).any()
    assert not training.held_out.any()
    assert judged.held_out.all()


def test_held_out_scenes_have_every_value_and_training_every_pair(fresh_seed: int) -> None:
    judged = draw_scenes(20_000, generator(fresh_seed), held_out=True)
    training = draw_scenes(200_000, generator(fresh_seed), held_out=False)
    for name, size in SIZES.items():
        shares = torch.bincount(getattr(judged, name), minlength=size) / len(judged)
        assert shares.min() > 0.3 / size, f"{name} {int(shares.argmin())} is hardly ever held out"
    for pair in combinations(SIZES, 2):
        possible = draw_scenes(50_000, generator(fresh_seed + 2), held_out=None)
        assert torch.isin(combination(possible, pair), combination(training, pair)).all(), pair


def test_one_combination_in_nine_is_held_out() -> None:
    assert every_scene().held_out.float().mean() == pytest.approx(1 / 9, abs=0.005)


# Drawing


@pytest.mark.parametrize("held_out", [False, True, None])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
def test_as_many_as_asked_for(fresh_seed: int, count: int, held_out: bool | None) -> None:
    for i in range(20):
        scenes = draw_scenes(count, generator(fresh_seed + i), 0.0, held_out)
        assert {len(getattr(scenes, f.name)) for f in fields(scenes)} == {count}


def test_too_few_possible_scenes_are_drawn_again(fresh_seed: int) -> None:
    """Held-out scenes among nearly only cameras: the first draw rarely has enough."""
    scenes = draw_scenes(50, generator(fresh_seed), camera_share=0.97, held_out=True)
    assert len(scenes) == 50
    assert scenes.held_out.all()
    with pytest.raises(ValueError, match="no camera scene"):
        draw_scenes(1, generator(0), camera_share=1.0, held_out=True)


def test_a_seed_draws_the_same_scenes(fresh_seed: int) -> None:
    first, again, other = (draw_scenes(500, generator(s), 0.3) for s in (fresh_seed, fresh_seed, fresh_seed + 1))
    assert all(torch.equal(getattr(first, f.name), getattr(again, f.name)) for f in fields(first))
    assert not torch.equal(first.random, other.random)


def test_scenes_can_be_told_apart(fresh_seed: int) -> None:
    scenes = draw_scenes(20_000, generator(fresh_seed), held_out=None)
    distance = (palette()[scenes.colour] - palette()[scenes.background]).norm(dim=1)
    assert distance.min() > 0.5
    turning = {SHAPES[i] for i in scenes.shape[scenes.motion == TURN].unique()}
    assert turning == {"square", "triangle"}  # a turning circle would look still


def test_camera_share(fresh_seed: int) -> None:
    scenes = draw_scenes(20_000, generator(fresh_seed), camera_share=0.3, held_out=None)
    assert scenes.is_camera.float().mean() == pytest.approx(0.3, abs=0.03)
    assert set(scenes.camera.tolist()) == set(range(len(CAMERAS)))
    assert draw_scenes(100, generator(fresh_seed), camera_share=1.0, held_out=None).is_camera.all()


# Rendering


def test_render_is_repeatable_and_in_range(fresh_seed: int) -> None:
    scenes = draw_scenes(24, generator(fresh_seed), camera_share=0.4)
    video = render(scenes, 9, 64, 96)
    assert video.shape == (24, 3, 9, 64, 96)
    assert video.dtype == torch.float32
    assert video.min() >= -1
    assert video.max() <= 1
    assert torch.equal(video, render(scenes, 9, 64, 96))
    one = 5  # a clip does not depend on what it is drawn with
    assert torch.allclose(video[one : one + 1], render(scenes[one : one + 1], 9, 64, 96), atol=1e-6)


def test_windows_and_frames_are_cut_out_of_the_whole(fresh_seed: int) -> None:
    scenes = draw_scenes(12, generator(fresh_seed), camera_share=0.4)
    whole = render(scenes, 17, 80, 128)
    part = render(scenes, 17, 80, 128, window=(16, 40, 32, 48), frames=slice(5, 12))
    assert torch.allclose(part, whole[:, :, 5:12, 16:48, 40:88], atol=1e-6)


def test_a_size_shows_the_same_scene(fresh_seed: int) -> None:
    scenes = draw_scenes(12, generator(fresh_seed), camera_share=0.3)
    large, small = render(scenes, 5, 128, 192), render(scenes, 5, 64, 96)
    shrunk = torch.nn.functional.avg_pool3d(large, (1, 2, 2))
    assert (shrunk - small).abs().mean() < 0.03


def plain(motion: str, seed: int, shape: str | None = None) -> tuple[Tensor, Scenes]:
    """Where the shape is, float [B, T, H, W], by its distance to the colour of the frame's corner. Plain background."""
    scenes = draw_scenes(4000, generator(seed), held_out=None)
    wanted = (scenes.motion == MOTIONS.index(motion)) & (scenes.texture == TEXTURES.index("plain"))
    if shape is not None:
        wanted &= scenes.shape == SHAPES.index(shape)
    scenes = scenes[wanted.nonzero()[:6, 0]]
    assert len(scenes) == 6
    video = render(scenes, 33, 96, 160)
    return ((video - video[:, :, :, :1, :1]).norm(dim=1) > 0.5).float(), scenes


@pytest.mark.parametrize("motion", MOTIONS)
def test_motions_are_what_they_are_called(fresh_seed: int, motion: str) -> None:
    """Measured apart from the analyser, in pixels of the frame: x to the right, y downwards."""
    mask, _ = plain(motion, fresh_seed)
    area = mask.sum(dim=(2, 3))
    x = (mask.sum(dim=2) * torch.arange(160)).sum(dim=2) / area
    y = (mask.sum(dim=3) * torch.arange(96)).sum(dim=2) / area
    dx, dy, growth = x[:, -1] - x[:, 0], y[:, -1] - y[:, 0], area[:, -1] / area[:, 0]
    assert (area > 100).all()  # never out of the frame
    assert not mask[..., [0, -1], :].any()  # nor at its edges
    assert not mask[..., [0, -1]].any()
    if motion in ("left", "right"):
        assert (dx * (1 if motion == "right" else -1) > 14).all()
        assert (dy.abs() < 2).all()
    elif motion in ("up", "down"):
        assert (dy * (1 if motion == "down" else -1) > 14).all()
        assert (dx.abs() < 2).all()
    else:
        assert (dx.abs() < 2).all()
    if motion == "grow":
        assert (growth > 4).all()
    elif motion == "shrink":
        assert (growth < 1 / 4).all()
    else:
        assert growth.log().abs().max() < 0.12
    if motion == "bounce":
        for path in y:
            assert path.max() - path.min() > 14
            away = path - (path.max() + path.min()) / 2
            above = away[away.abs() > 4] > 0
            assert (above[1:] != above[:-1]).sum() >= 2  # swings to the other side and back
    if motion in ("turn", "still"):
        changed = (mask[:, 5:] != mask[:, :-5]).sum(dim=(2, 3)) / area[:, 5:]
        assert (changed.mean(dim=1) > 0.04).all() if motion == "turn" else (changed == 0).all()


def test_large_shapes_are_larger(fresh_seed: int) -> None:
    mask, scenes = plain("still", fresh_seed, "circle")
    area = mask[:, 0].sum(dim=(1, 2))
    if scenes.large.any() and not scenes.large.all():
        assert area[scenes.large].min() > 1.5 * area[~scenes.large].max()
    radius = (area / torch.pi).sqrt() / 96
    wanted = torch.where(scenes.large, 0.2, 0.125)
    assert (radius / wanted - 1).abs().max() < 0.12


def test_clouds_show_every_pan(fresh_seed: int) -> None:
    """No direction along which they look the same: the structure tensor's smaller eigenvalue is a good part of both."""
    scenes = draw_scenes(1500, generator(fresh_seed), camera_share=1.0, held_out=None)
    scenes = scenes[scenes.texture == CAMERA_TEXTURES.index("cloudy")]
    assert len(scenes) > 250
    grey = render(scenes, 1, 48, 80)[:, :, 0].mean(dim=1)
    slopes = torch.stack([s.flatten(1) for s in torch.gradient(grey, dim=(1, 2))], dim=1)
    small, large = torch.linalg.eigvalsh(slopes @ slopes.mT).unbind(1)
    assert (small / large).min() > 0.2


def test_collages_fill_the_frame(fresh_seed: int) -> None:
    collage = render_collage(6, 5, 64, 96, generator(fresh_seed), "cpu")
    assert collage.shape == (6, 3, 5, 64, 96)
    assert collage.min() >= -1
    assert collage.max() <= 1
    assert torch.equal(collage, render_collage(6, 5, 64, 96, generator(fresh_seed), "cpu"))
    assert (collage.flatten(2).std(dim=2) > 0.02).all()
    assert (collage.diff(dim=2).abs().mean(dim=(1, 2, 3, 4)) > 1e-3).all()  # it moves
