"""What is asked: the world's own clips answer it right, and the same numbers ask the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from turbowan.errors import MediaError, RequestError
from turbowan.evaluate.questions import (
    CameraQuestions,
    PhotoQuestions,
    PictureQuestions,
    Questions,
    ShapeQuestions,
)
from turbowan.world.scenes import CAMERAS

SIZE = (17, 96, 160)
CPU = torch.device("cpu")


def all_questions(count: int, seed: int) -> list[Questions]:
    return [
        ShapeQuestions(count, seed), ShapeQuestions(count, seed, from_pictures=True), CameraQuestions(count, seed),
        PictureQuestions(count, seed),
    ]  # fmt: skip


def test_the_world_answers_its_own_questions(fresh_seed: int) -> None:
    for questions in all_questions(6, fresh_seed):
        rows = [5, 0, 3]
        given = questions.give(rows, SIZE, CPU)
        assert given.clips is not None
        right, travel = questions.judge(given.clips, rows)
        assert all(marks.all() for marks in right.values()), (questions.what, right)
        moving = torch.tensor([questions.answers["direction"][row] != "still" for row in rows])
        assert (travel[moving] > 0.05).all()
        wrong, _ = questions.judge(given.clips.roll(1, dims=0), rows)
        answers = [tuple(names[row] for names in questions.answers.values()) for row in rows]
        if len(set(answers)) == 3:
            assert not torch.stack(list(wrong.values())).all(dim=0).any()


def test_a_row_is_the_same_whoever_is_beside_it(fresh_seed: int) -> None:
    for questions, again in zip(all_questions(11, fresh_seed), all_questions(11, fresh_seed), strict=True):
        assert (questions.texts, questions.answers, questions.asked) == (again.texts, again.answers, again.asked)
        some, other = questions.give([2, 9, 10], (5, 48, 64), CPU), again.give([10], (5, 48, 64), CPU)
        assert some.clips is not None
        assert other.clips is not None
        assert torch.equal(some.clips[2:], other.clips)
        assert (some.pictures is not None) == questions.from_pictures
        if some.pictures is not None and other.pictures is not None:
            assert torch.equal(some.pictures[2:], other.pictures)
            assert (some.pictures - some.clips[:, :, 0]).abs().max() <= 1 / 255 + 1e-6  # in 8 bits
            assert torch.equal((some.pictures * 0.5 + 0.5).mul(255).round() / 127.5 - 1, some.pictures)


def test_other_seeds_ask_other_questions(fresh_seed: int) -> None:
    for one, other in zip(all_questions(8, fresh_seed), all_questions(8, fresh_seed + 1), strict=True):
        assert one.texts != other.texts


def test_shapes_are_held_out(fresh_seed: int) -> None:
    assert ShapeQuestions(50, fresh_seed).scenes.held_out.all()


def test_a_shape_that_is_not_there_has_no_travel(fresh_seed: int) -> None:
    grey = torch.zeros(2, 3, *SIZE)
    right, travel = ShapeQuestions(2, fresh_seed).judge(grey, [0, 1])
    assert travel.isnan().all()
    assert not right["shape"].any()


def test_every_camera_goes_over_every_photo(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for name, shape in (("b.png", (40, 90, 3)), ("a.JPG", (200, 100, 3)), ("grey.webp", (64, 64))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    questions = PhotoQuestions(tmp_path)
    assert questions.asked["photos"] == ["a.JPG", "b.png", "grey.webp"]
    assert questions.answers["photo"] == [name for name in questions.asked["photos"] for _ in CAMERAS]
    assert questions.answers["direction"] == list(CAMERAS) * 3
    assert len(questions.texts) == 18
    assert "camera" in questions.texts[0] or "pan" in questions.texts[0] or "moves" in questions.texts[0]
    given = questions.give([0, 5, 6, 17], (5, 48, 64), CPU)
    assert given.clips is None
    assert given.pictures is not None
    assert given.pictures.shape == (4, 3, 48, 64)
    assert torch.equal(given.pictures[0], given.pictures[1])
    assert not torch.equal(given.pictures[1], given.pictures[2])


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is no folder with pictures"):
        PhotoQuestions(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="is no folder with pictures"):
        PhotoQuestions(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n and then nothing")
    with pytest.raises(MediaError, match=r"broken\.png"):
        PhotoQuestions(tmp_path)
    for make in (ShapeQuestions, CameraQuestions, PictureQuestions):
        with pytest.raises(RequestError, match="at least 1 prompt, got 0"):
            make(0)
