"""The table of published models: names as their publishers write them, families and roles that exist."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from turbowan.checkpoints.manifest import ROLES
from turbowan.checkpoints.published import PUBLISHED, Part, find_published
from turbowan.errors import CheckpointError
from turbowan.specs import FAMILIES, RESOLUTIONS, Defaults

# as the README of thu-ml/TurboDiffusion gives them
TURBO = {
    "TurboDiffusion/TurboWan2.1-T2V-1.3B-480P": ["TurboWan2.1-T2V-1.3B-480P"],
    "TurboDiffusion/TurboWan2.1-T2V-14B-480P": ["TurboWan2.1-T2V-14B-480P"],
    "TurboDiffusion/TurboWan2.1-T2V-14B-720P": ["TurboWan2.1-T2V-14B-720P"],
    "TurboDiffusion/TurboWan2.2-I2V-A14B-720P": ["TurboWan2.2-I2V-A14B-high-720P", "TurboWan2.2-I2V-A14B-low-720P"],
}
SHARED = {"vae": "Wan2.1_VAE.pth", "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth", "tokenizer": "google/umt5-xxl/"}


@pytest.mark.parametrize("repo", TURBO)
@pytest.mark.parametrize("quant", [True, False])
def test_turbodiffusion_names(repo: str, quant: bool) -> None:
    model, int8 = find_published(repo, quant)
    assert int8 is quant
    parts = {**model.parts, **(model.quant if quant else {})}
    weights = [part for role, part in parts.items() if role not in SHARED]
    assert [part.path for part in weights] == [f"{name}{'-quant' if quant else ''}.pth" for name in TURBO[repo]]
    assert {part.repo for part in weights} == {repo}
    assert {role: parts[role].path for role in SHARED} == SHARED
    assert {parts[role].repo for role in SHARED} == {"Wan-AI/Wan2.1-T2V-1.3B"}


@pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_every_model_makes_a_whole(model) -> None:
    assert re.fullmatch(r"[a-z0-9.-]+", model.name)
    assert set(model.parts) <= set(ROLES)
    assert set(model.quant) <= set(model.parts)
    if model.family is None:
        return
    assert set(model.settings) <= {field.name for field in fields(Defaults)}
    assert model.settings.get("resolution", FAMILIES[model.family].resolution) in RESOLUTIONS
    assert {"vae", "text_encoder", "tokenizer"} < set(model.parts)
    assert ("transformer" in model.parts) != ({"high_noise", "low_noise"} <= set(model.parts))
    assert ("i2v" in model.name) == ("i2v" in model.family)
    assert ("image_encoder" in model.parts) == (model.family == "wan2.1-i2v")


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_in_any_case_and_with_their_owner(name: str) -> None:
    model = PUBLISHED[name]
    for spelling in (name, name.upper(), f" {name}/", *([model.repo, model.repo.lower()] if model.family else [])):
        assert find_published(spelling) == (model, bool(model.quant))
    assert find_published(name, quant=False) == (model, False)


def test_the_name_may_ask_for_int8() -> None:
    assert find_published("TurboWan2.1-T2V-14B-720P-quant")[1] is True
    with pytest.raises(CheckpointError, match="is the int8 variant"):
        find_published("turbowan2.1-t2v-14b-720p-quant", quant=False)
    with pytest.raises(CheckpointError, match="no published int8 weights"):
        find_published("wan2.1-t2v-14b", quant=True)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("turbowan2.1-t2v-1.3b", "turbowan2.1-t2v-1.3b-480p"),
        ("turbowan22-i2v-a14b-720p", "turbowan2.2-i2v-a14b-720p"),
        ("someone/Wan2.1-T2V-14B", "wan2.1-t2v-14b"),
        ("qqqq", "there are turbowan2.1-t2v-1.3b-480p"),
    ],
)
def test_unknown_names_get_the_close_ones(name: str, near: str) -> None:
    with pytest.raises(CheckpointError, match=f"no published model is called '{name}'") as caught:
        find_published(name)
    assert near in str(caught.value)


def test_which_files_belong_to_a_part() -> None:
    folder = Part("a/b", "high_noise_model/")
    assert folder.holds("high_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors")
    assert not folder.holds("low_noise_model/config.json")
    index = PUBLISHED["wan2.1-t2v-14b"].parts["transformer"]
    assert index.holds("diffusion_pytorch_model.safetensors.index.json")
    assert index.holds("diffusion_pytorch_model-00006-of-00006.safetensors")
    assert not index.holds("diffusion_pytorch_model.safetensors")
    assert not Part("a/b", "Wan2.1_VAE.pth").holds("assets/Wan2.1_VAE.pth")
