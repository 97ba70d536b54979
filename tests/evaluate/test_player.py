"""A player's videos are those a user gets; its noise belongs to each sample alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from turbowan import Engine, GenerateRequest
from turbowan.checkpoints.manifest import read_manifest, write_manifest
from turbowan.errors import CheckpointError
from turbowan.evaluate.case import read_case
from turbowan.evaluate.player import Player, Players

PROMPTS = ["a red circle moves right on a blue background", "A green ring bounces."]
SEEDS = [1234567, 5]

pytestmark = pytest.mark.filterwarnings("ignore::turbowan.errors.Note")


@pytest.fixture(scope="module")
def players() -> Players:
    return Players("cpu")


def pictures() -> tuple[list[np.ndarray], Tensor]:
    arrays = list(np.random.default_rng(9).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8))
    return arrays, torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_text_to_video_as_the_engine_makes_it(players: Players, small_t2v: Path) -> None:
    player = players.player(read_case(f"{small_t2v}:guidance_scale=3"))
    engine = Engine.load(small_t2v, device="cpu")
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        videos = player.videos(player.latents([prompt], [seed]))
        assert (videos.shape, videos.dtype) == ((1, 3, 5, 48, 64), torch.uint8)
        frames = engine.generate(GenerateRequest(prompt=prompt, seed=seed, guidance_scale=3)).frames
        assert np.array_equal(videos[0].permute(1, 2, 3, 0).numpy(), frames)


def test_image_to_video_as_the_engine_makes_it(players: Players, small_i2v: Path) -> None:
    """Two experts, fresh noise in every step, and a first picture for each sample."""
    player = players.player(read_case(str(small_i2v)))
    arrays, tensor = pictures()
    videos = player.videos(player.latents(PROMPTS, SEEDS, tensor))
    engine = Engine.load(small_i2v, device="cpu")
    for prompt, seed, array, video in zip(PROMPTS, SEEDS, arrays, videos, strict=True):
        frames = engine.generate(GenerateRequest(prompt=prompt, seed=seed, image=array)).frames
        apart = np.abs(video.permute(1, 2, 3, 0).numpy().astype(int) - frames)
        assert apart.max() <= 1  # the VAE encodes both pictures at once
    assert not torch.equal(*videos)


def test_a_reconstruction_is_the_vaes_own(players: Players, small_i2v: Path) -> None:
    player = players.player(read_case(str(small_i2v)))
    _, tensor = pictures()
    smooth = torch.nn.functional.avg_pool2d(tensor, 9, stride=1, padding=4)
    found = player.reconstruct(smooth)
    assert (found.shape, found.dtype) == ((2, 3, 48, 64), torch.uint8)
    assert (found.float() / 127.5 - 1 - smooth).square().mean().sqrt() < 0.1


def test_the_exact_player_differs_in_arithmetic_alone(
    players: Players, small_i2v: Path, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    player = players.player(read_case(f"{small_i2v}:steps=2,sla_topk=0.3,sigma_max=100"))
    assert not player.is_exact
    exact = players.in_float32_dense(player)
    assert exact.is_exact
    assert exact.how.dtype == torch.float32
    assert exact.settings == replace(player.settings, attention="original")
    _, tensor = pictures()
    ours, dense = (p.latents(PROMPTS, SEEDS, tensor) for p in (player, exact))
    assert 0 < relative_error(ours, dense) < 0.5
    again = players.player(read_case(f"{small_i2v}:steps=2,attention=original,sigma_max=100"))
    assert players.in_float32_dense(again) is again
    assert torch.equal(again.latents(PROMPTS, SEEDS, tensor), dense)


def test_the_exact_player_may_be_of_another_model(players: Players, small_t2v: Path, tmp_path: Path) -> None:
    """Its weights count, not its manifest."""
    manifest = read_manifest(small_t2v)
    write_manifest(replace(manifest, name="other", num_steps=9, shift=3.0), tmp_path)
    player = players.player(read_case(f"{small_t2v}:exact={tmp_path}"))
    exact = players.in_float32_dense(player)
    assert exact.engine.manifest.name == "other"
    assert exact.settings == player.settings


def test_facts_say_how_it_was_sampled(players: Players, small_i2v: Path) -> None:
    facts = players.player(read_case(f"{small_i2v}:steps=1,precision=bf16,ode=true")).facts()
    assert facts == {
        "model": "small-i2v", "sampler": "rcm", "num_steps": 1, "ode": True, "sigma_max": 80.0, "shift": 5.0,
        "guidance_scale": 1.0, "boundary": 0.9, "attention": "sla", "sla_topk": 0.5, "precision": "bfloat16",
        "linears": "bf16",
        "exact": str(small_i2v),
    }  # fmt: skip


def test_cases_of_one_model_share_its_weights(players: Players, small_t2v: Path) -> None:
    one, other = (players.player(read_case(f"{small_t2v}:steps={steps}")) for steps in (2, 3))
    assert one.engine is other.engine
    rounded = players.player(read_case(f"{small_t2v}:precision=bf16"))
    assert rounded.engine is not one.engine


def test_a_case_that_its_model_cannot_do(players: Players, small_t2v: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model"):
        players.player(read_case("nowhere"))


def test_no_warning_is_lost(players: Players, small_t2v: Path) -> None:
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        player = players.player(read_case(f"{small_t2v}:steps=2"))
    assert any("too few" in str(note.message) for note in notes)
    assert isinstance(player, Player)
