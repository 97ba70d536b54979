"""The judge of prompts: it finds what a picture shows, and nothing of what it does not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from turbowan import Engine, GenerateRequest
from turbowan.errors import RequestError
from turbowan.evaluate.prompts import evaluate_prompts
from turbowan.world.scenes import draw_scenes, render

REQUEST = GenerateRequest(prompt="-", num_steps=10)


class Painter:
    """In place of an engine: renders the scenes that a seed draws, so that what is judged is known."""

    device = torch.device("cpu")

    def __init__(self, seed: int, count: int, shuffled: bool) -> None:
        scenes = draw_scenes(count, torch.Generator().manual_seed(seed), held_out=True)
        video = render(scenes, 33, 80, 128)
        frames = ((video + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
        self.videos = list(np.roll(frames, 1, axis=0) if shuffled else frames)

    def generate_batch(self, prompts, request) -> SimpleNamespace:
        taken, self.videos = self.videos[: len(prompts)], self.videos[len(prompts) :]
        return SimpleNamespace(videos=taken)


@pytest.mark.parametrize("shuffled", [False, True])
def test_right_pictures_are_right_and_others_are_not(tmp_path, shuffled: bool) -> None:
    """Clips of the prompts' own scenes, and the same clips each beside another one's prompt."""
    sheet = tmp_path / "sheet.png"
    report = evaluate_prompts(Painter(24_680, 24, shuffled), 24, REQUEST, batch=8, sheet=sheet)
    assert report["prompts"] == 24
    shares = {name: value["share"] for name, value in report["right"].items()}
    assert set(shares) == {"colour", "shape", "direction", "background", "all"}
    assert report["motion"] > 0
    assert sheet.stat().st_size > 0
    if shuffled:
        assert shares["all"] <= 0.1
        assert max(shares.values()) <= 0.6
        assert sum(report["wrong_by"]["shape"].values()) == 24 - report["right"]["shape"]["right"]
    else:
        assert shares["all"] >= 0.95


def test_the_embedded_model_follows_its_prompts() -> None:
    """Two held-out prompts at its own size, for real; chance is far below one in a hundred."""
    engine = Engine.load("tiny", device="cpu")
    request = replace(REQUEST, num_steps=12, seed=1, memory="speed")
    report = evaluate_prompts(engine, 2, request, batch=2)
    assert report["right"]["background"]["right"] == 2
    assert report["right"]["colour"]["right"] >= 1


def test_an_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(RequestError, match="at least 1 prompt"):
        evaluate_prompts(None, 0, REQUEST)
