"""Sizes, frame counts and choices, without ComfyUI."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from turbowan.comfy import checks, folders, foreign
from turbowan.errors import CheckpointError, RequestError


@pytest.mark.parametrize(("asked", "given"), [(77, 77), (81, 81), (80, 77), (9, 9), (7, 5)])
def test_frames_are_rounded_down_and_it_is_said(asked: int, given: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert checks.frame_count(asked, "num_frames") == given
    assert bool(caplog.messages) == (asked != given)


@pytest.mark.parametrize(
    ("resolution", "ratio", "size"),
    [
        ("480", "16:9", (768, 432)), ("480p", "16:9", (832, 480)), ("512", "4:3", (640, 512)),
        ("720", "9:16", (704, 1280)), ("720p", "1:1", (960, 960)), ("1080p", "16:9", (1920, 1088)),
        ("custom", "1:1", (208, 96)),
    ],
)  # fmt: skip
def test_names_of_sizes(resolution: str, ratio: str, size: tuple[int, int]) -> None:
    assert checks.choose_size(resolution, ratio, 205, 90) == size


def a_model(channels: int = 36, dim: int = 128, text: int = 64, blocks: int = 2, source: str = "") -> SimpleNamespace:
    net = SimpleNamespace(
        patch_embedding=SimpleNamespace(weight=torch.empty(dim, channels, 1, 2, 2)),
        text_embedding=[SimpleNamespace(weight=torch.empty(dim, text))],
        blocks=[None] * blocks,
    )
    return SimpleNamespace(model=SimpleNamespace(diffusion_model=net, source=source))


@pytest.mark.parametrize(
    ("model", "width", "words"),
    [
        (a_model(16), 64, "high_noise_model.*36.*16"),
        (a_model(), 96, "conditioning.*96.*64"),
        (SimpleNamespace(), 64, "high_noise_model.*SimpleNamespace"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(model: SimpleNamespace, width: int, words: str) -> None:
    checks.check_model(a_model(), "high_noise_model", [[torch.empty(1, 5, 64), {}]], 36)
    with pytest.raises(RequestError, match=words):
        checks.check_model(model, "high_noise_model", [[torch.empty(1, 5, width), {}]], 36)


def test_two_experts_must_be_a_pair() -> None:
    checks.check_pair(a_model(source="wan-high.pth"), a_model(source="wan-low.pth"))
    checks.check_pair(a_model(source="highland.pth"), a_model(source="a-high-b.pth"))
    with pytest.raises(RequestError, match=r"width 128.*width 256"):
        checks.check_pair(a_model(), a_model(dim=256))
    with pytest.raises(RequestError, match="interchanged"):
        checks.check_pair(a_model(source="TurboWan2.2-I2V-A14B-low-720P.pth"), a_model(source="x/high.pth"))


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in folders.EMBEDDED.items() for name in names]
)
def test_embedded_files_are_there(kind: str, name: str) -> None:
    assert name in folders.choices(kind)
    assert folders.find(name, (kind,), "x").exists()


def test_a_missing_file_is_refused_by_name_and_in_words_to_the_page() -> None:
    with pytest.raises(CheckpointError, match=r"model_name: 'none.pth'.*diffusion_models"):
        folders.find("none.pth", (folders.TRANSFORMERS,), "model_name")
    assert "none.pth" in str(folders.check("none.pth", (folders.TRANSFORMERS,), "model_name"))
    assert folders.check(None, (folders.TRANSFORMERS,), "model_name") is True
    assert folders.check("tiny", (folders.TRANSFORMERS,), "model_name") is True


def test_embedded_transformers_know_the_share_they_were_trained_for() -> None:
    shares = {name: folders.embedded_topk(name) for name in ("tiny", "tiny-i2v-high", "tiny-i2v-low", "Wan2.1.pth")}
    assert shares.pop("Wan2.1.pth") is None
    assert all(share is not None and 0.1 < share <= 1 for share in shares.values()), shares


def test_conditions_in_either_form_become_comfyuis() -> None:
    text, values = torch.randn(1, 5, 8), {"pooled_output": None}
    assert foreign.core_form([[text, values]], "positive") == [[text, values]]
    assert foreign.core_form([[{"crossattn_emb": text}, {}]], "positive") == [[text, {}]]


@pytest.mark.parametrize(
    ("given", "words"),
    [([[torch.randn(5, 8), {}]], r"positive.*\[5, 8\]"), ([[{}, {}]], "positive.*NoneType"), ([], "positive.*nothing")],
)
def test_conditions_that_hold_no_text_are_refused(given: list, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        foreign.core_form(given, "positive")
