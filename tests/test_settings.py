"""What a request leaves open comes from the manifest; sizes come from the tables, the image, or both."""

from __future__ import annotations

from dataclasses import replace

import pytest

from turbowan.checkpoints.manifest import Manifest, from_defaults
from turbowan.errors import Note
from turbowan.request import GenerateRequest
from turbowan.settings import fit_area, resolve
from turbowan.specs import RESOLUTIONS


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    files = {role: tmp_path / role for role in ("transformer", "vae", "text_encoder")}
    return from_defaults("turbo", "turbo-t2v", files)


def test_the_request_stands_before_the_manifest(manifest):
    settings = resolve(GenerateRequest(prompt="a cat"), manifest)
    assert (settings.num_steps, settings.sampler, settings.sigma_max) == (4, "rcm", 80.0)
    assert (settings.width, settings.height, settings.num_frames, settings.fps) == (832, 480, 81, 16)
    own = GenerateRequest(prompt="a cat", num_steps=2, sigma_max=200.0, resolution="720p", aspect_ratio="9:16", fps=24)
    settings = resolve(own, manifest)
    assert (settings.num_steps, settings.sigma_max, settings.fps) == (2, 200.0, 24)
    assert (settings.width, settings.height) == (720, 1280)


@pytest.mark.parametrize("name", sorted(RESOLUTIONS))
def test_every_named_size_is_one_the_model_takes(name):
    for width, height in RESOLUTIONS[name].values():
        GenerateRequest(prompt="a cat", width=width, height=height)


def test_1080p():
    assert RESOLUTIONS["1080p"]["16:9"] == (1920, 1088)
    assert RESOLUTIONS["1080p"]["9:16"] == (1088, 1920)


@pytest.mark.parametrize("size", [(1000, 1000), (4000, 1000), (333, 777), (1920, 1080)])
def test_the_image_gives_the_ratio_and_the_resolution_the_area(manifest, size):
    request = GenerateRequest(prompt="a cat", resolution="480p", adaptive_resolution=True)
    settings = resolve(request, manifest, size)
    assert settings.width % 16 == settings.height % 16 == 0
    assert settings.width * settings.height == pytest.approx(832 * 480, rel=0.06)
    assert settings.width / settings.height == pytest.approx(size[0] / size[1], rel=0.06)


def test_more_steps_than_distilled_for_are_remarked_on(manifest):
    with pytest.warns(UserWarning, match="distilled for 4 steps; 8 rarely"):
        resolve(GenerateRequest(prompt="a cat", num_steps=8), manifest)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"shift": 3.0}, "shift has no effect with the sampler rcm"),
        ({"boundary": 0.5}, "boundary has no effect with a single transformer"),
        ({"negative_prompt": "blur"}, r"negative_prompt has no effect without guidance \(scale 1\)"),
        ({"sampler": "euler", "num_steps": 4, "ode": True}, "ode has no effect with the sampler euler"),
        ({"sampler": "unipc", "num_steps": 4, "sigma_max": 9.0}, "sigma_max has no effect with the sampler unipc"),
        ({"width": 64, "height": 64, "aspect_ratio": "1:1"}, "aspect_ratio has no effect beside width and height"),
    ],
)
def test_values_without_effect_are_remarked_on(manifest, values, line):
    with pytest.warns(Note, match=line):
        resolve(GenerateRequest(prompt="a cat", **values), manifest)


def test_a_manifest_without_a_size_of_its_own_and_one_with(manifest):
    small = replace(manifest, width=256, height=160)
    assert resolve(GenerateRequest(prompt="a cat"), small).width == 256
    turned = resolve(GenerateRequest(prompt="a cat", aspect_ratio="9:16"), small)
    assert turned.width < turned.height
    assert turned.width * turned.height == pytest.approx(256 * 160, rel=0.1)
    assert resolve(GenerateRequest(prompt="a cat", resolution="480p"), small).width == 832


def test_areas_never_become_nothing():
    assert min(fit_area(16 * 16, 100.0)) >= 16
