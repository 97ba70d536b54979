"""Comparisons with known outcomes, painted in place of generated, and a small one for real."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from turbowan.errors import RequestError
from turbowan.evaluate.case import Case, read_case
from turbowan.evaluate.compare import WORLD, Extent, compare
from turbowan.evaluate.player import Players
from turbowan.evaluate.questions import CameraQuestions, PictureQuestions, ShapeQuestions
from turbowan.stages import to_uint8

pytestmark = pytest.mark.filterwarnings("ignore::turbowan.errors.Note")

SIZE = (17, 80, 128)


class Painters:
    """In place of models: paint the world's own clips, each case with a fault of its own.

    Cases: "right"; "shuffled" gives each prompt another one's clip; "slow" shows half of the motion; "seeded" adds the
    number of the draw to a grey value. Latents are the clips' seeds.
    """

    def __init__(self, questions: ShapeQuestions | CameraQuestions, seed: int = 0) -> None:
        self.questions, self.seed = questions, seed
        self.seeds: list[list[int]] = []  # of every batch that was asked for

    def player(self, case: Case) -> SimpleNamespace:
        return SimpleNamespace(
            case=case, size=SIZE, how=SimpleNamespace(device=torch.device("cpu")), settings=case.name,
            engine=SimpleNamespace(needs_image=False), facts=lambda: {"case": case.name}, latents=self.latents,
            videos=lambda latents: self.paint(case.name, latents),
        )  # fmt: skip

    def in_float32_dense(self, player: SimpleNamespace) -> SimpleNamespace:
        if player.case.name == "right":
            return player
        exact = Painters(self.questions, self.seed)
        return SimpleNamespace(case=read_case("exact"), settings="", latents=lambda *given: 0.8 * exact.latents(*given))

    def latents(self, texts: Sequence[str], seeds: Sequence[int], pictures: Tensor | None = None) -> Tensor:
        rows = [(seed - self.seed) % 1_000_003 for seed in seeds]
        assert list(texts) == [self.questions.texts[row] for row in rows]
        assert pictures is None
        self.seeds.append(list(seeds))
        return torch.tensor(seeds, dtype=torch.float64).view(-1, 1, 1, 1, 1)

    def paint(self, name: str, latents: Tensor) -> Tensor:
        seeds = latents.flatten().long() - self.seed
        rows = (seeds % 1_000_003).tolist()
        if name == "shuffled":
            rows = [(row + 1) % len(self.questions.texts) for row in rows]
        clips = self.questions.give(rows, SIZE, torch.device("cpu")).clips
        assert clips is not None
        video = to_uint8(clips)
        if name == "slow":
            return video[:, :, : SIZE[0] // 2 + 1].repeat_interleave(2, dim=2)[:, :, : SIZE[0]]
        if name == "seeded":
            return torch.full_like(video, 100) + (10 * (seeds // 1_000_003)).view(-1, 1, 1, 1, 1).to(torch.uint8)
        return video


def cases(*names: str) -> list[Case]:
    return [read_case(name) for name in names]


def test_painted_faults_are_found(fresh_seed: int) -> None:
    questions = ShapeQuestions(18, fresh_seed)
    painters = Painters(questions, seed=7)
    extent = Extent(batch=7, seed=7, diversity=5, draws=3, errors=4)
    part, _ = compare(cases("right", "shuffled", "slow", "seeded"), "right", questions, extent, painters)  # type: ignore[arg-type]

    assert part["rows"] == list(range(18))
    assert part["texts"] == questions.texts
    assert [seeds[0] for seeds in painters.seeds[::4]] == [7, 14, 21, 7, 14, 21]  # 7, 7, 4 prompts; then 2, 2, 1
    assert all(seeds == painters.seeds[i // 4 * 4] for i, seeds in enumerate(painters.seeds))  # alike for all cases
    right = {name: case["right"]["all"] for name, case in part["cases"].items()}
    assert sum(right[WORLD]) >= 17
    assert right["right"] == right[WORLD]
    assert sum(right["shuffled"]) <= 4
    summary = part["summary"]
    found = summary["shuffled"]["against"]["right"]["all"]
    assert found["b"] == sum(a and not b for a, b in zip(right["shuffled"], right["right"], strict=True))
    assert found["c"] == sum(b and not a for a, b in zip(right["shuffled"], right["right"], strict=True))
    assert found["low"] <= found["points"] < found["high"] < -30
    assert summary["slow"]["against"]["travel"]["ratio"] == pytest.approx(0.5, abs=0.1)
    assert summary["slow"]["against"]["change"]["ratio"] == pytest.approx(0.5, abs=0.1)
    assert summary[WORLD]["against"]["travel"]["ratio"] == 1
    assert "against" not in summary["right"]

    still = [i for i, name in enumerate(questions.answers["direction"]) if name == "still"]
    for name in ("change", "travel"):
        values = part["cases"]["right"]["values"][name]
        assert [i for i, value in enumerate(values) if value is None] == still
    assert all(value is None for value in part["cases"]["seeded"]["values"].get("travel", []))

    spread = [0, 3, 7, 10, 14]
    seeded = part["cases"]["seeded"]["values"]["diversity"]
    assert [i for i, value in enumerate(seeded) if value is not None] == spread
    assert seeded[0] == pytest.approx((10 + 10 + 20) / 3 / 255, rel=1e-4)
    assert summary["right"]["diversity"]["mean"] == 0
    assert "diversity" not in part["cases"][WORLD]["values"]

    errors = part["cases"]["slow"]["values"]["error"]
    assert [value for value in errors if value is not None] == [pytest.approx(0.25, rel=1e-4)] * 4
    assert summary["right"]["error"]["mean"] == 0
    missed = sum(summary["shuffled"]["wrong_by"]["shape"].values())
    assert missed == 18 - summary["shuffled"]["right"]["shape"]["right"]


def test_shards_make_up_the_whole() -> None:
    for total, parts in ((1000, 4), (7, 3), (3, 5)):
        rows = [list(Extent(1, shard=(i + 1, parts)).rows(total)) for i in range(parts)]
        assert list(chain(*rows)) == list(range(total))
        assert max(map(len, rows)) - min(map(len, rows)) <= 1
        for count in (0, 2, total, 2 * total):
            spread = [Extent(1, shard=(i + 1, parts)).spread(count, total) for i in range(parts)]
            assert list(chain(*spread)) == Extent(1).spread(count, total)
            assert len(list(chain(*spread))) == min(count, total)


def test_a_shard_finds_what_the_whole_finds(fresh_seed: int) -> None:
    questions = CameraQuestions(5, fresh_seed)
    whole, _ = compare(cases("slow"), WORLD, questions, Extent(batch=4), Painters(questions))  # type: ignore[arg-type]
    shard, _ = compare(cases("slow"), WORLD, questions, Extent(batch=2, shard=(2, 2)), Painters(questions))  # type: ignore[arg-type]
    assert shard["rows"] == [2, 3, 4]
    for kind in ("right", "values"):
        for key, column in shard["cases"]["slow"][kind].items():
            assert column == pytest.approx(whole["cases"]["slow"][kind][key][2:], rel=1e-3)


def test_text_to_video_for_real(small_t2v: Path) -> None:
    questions = ShapeQuestions(2)
    fine, coarse = f"{small_t2v}:steps=3", f"{small_t2v}:steps=1,sampler=euler"
    extent = Extent(batch=2, diversity=1, draws=2, errors=1)
    part, sheet = compare(cases(fine, coarse), fine, questions, extent, Players("cpu"))
    assert part["asked"] == {
        "scene_seed": 24_680, "prompts": 2, "seed": 0, "frames": 5, "height": 48, "width": 64,
        "diversity": 1, "draws": 2, "errors": 1,
    }  # fmt: skip
    assert list(part["cases"]) == [WORLD, fine, coarse]
    for name in (fine, coarse):
        values = part["cases"][name]["values"]
        assert values["error"] == [0.0, None]  # float32 and dense already
        assert values["diversity"][0] > 0.01
        assert values["diversity"][1] is None
        assert "psnr" not in values
    assert part["cases"][fine]["facts"]["num_steps"] == 3
    assert "frames_psnr" not in part["cases"][fine]["values"]
    assert all(5 < value < 40 for value in part["cases"][coarse]["values"]["frames_psnr"])
    same = f"{fine},ode=false"
    last, _ = compare(cases(same, fine), fine, questions, Extent(batch=2), Players("cpu"))
    assert list(last["cases"]) == [WORLD, same, fine]
    assert all(value > 100 for value in last["cases"][same]["values"]["frames_psnr"])  # the same bytes
    drawn = sheet.draw()
    assert drawn.width > drawn.height > 50


@pytest.mark.slow
def test_the_embedded_model_follows_its_prompts() -> None:
    """Two held-out prompts at its own size and in its own way; chance is far below one in a hundred."""
    part, _ = compare(cases("tiny"), WORLD, ShapeQuestions(2), Extent(batch=2, seed=1), Players("cpu"))
    right = part["summary"]["tiny"]["right"]
    assert right["background"]["right"] == 2
    assert right["colour"]["right"] >= 1
    assert part["summary"]["tiny"]["against"]["travel"]["ratio"] > 0.3


def test_image_to_video_for_real(small_i2v: Path) -> None:
    """Random weights keep nothing of the first frame; the VAE alone does."""
    questions = PictureQuestions(2)
    sparse, dense = str(small_i2v), f"{small_i2v}:attention=original"
    part, _ = compare(cases(sparse, dense), sparse, questions, Extent(batch=2, errors=2), Players("cpu"))
    ours, exact = part["cases"][sparse]["values"], part["cases"][dense]["values"]
    assert exact["error"] == [0.0, 0.0]
    assert all(0 < value < 0.5 for value in ours["error"])
    assert ours["vae_psnr"] == exact["vae_psnr"]
    assert all(vae > 20 > found for vae, found in zip(ours["vae_psnr"], ours["psnr"], strict=True))
    summary = part["summary"][sparse]
    assert summary["psnr_less_vae"]["mean"] == pytest.approx(summary["psnr"]["mean"] - summary["vae_psnr"]["mean"])


def test_what_cannot_be_compared_says_why(small_t2v: Path, small_i2v: Path) -> None:
    players = Players("cpu")
    with pytest.raises(RequestError, match=r"is text-to-video; take `turbowan evaluate prompts`"):
        compare(cases(str(small_t2v)), "", PictureQuestions(1), Extent(1), players)
    with pytest.raises(RequestError, match=r"is image-to-video; take `turbowan evaluate i2v`"):
        compare(cases(str(small_i2v)), "", ShapeQuestions(1), Extent(1), players)
    with pytest.raises(RequestError, match=r"of one size, got 5 frames of 64x48 \('.*'\) and 33 frames of 256x160"):
        compare(cases(str(small_t2v), "tiny"), "", ShapeQuestions(1), Extent(1), players)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"seed": -1}, {"draws": 1}, {"diversity": -1}, {"errors": -2}])
def test_an_extent_out_of_range_is_refused(wrong: dict[str, int]) -> None:
    (value,) = wrong.values()
    with pytest.raises(RequestError, match=f"{next(iter(wrong))} {value}"):
        Extent(**{"batch": 1, **wrong})


@pytest.mark.parametrize("shard", [(0, 2), (3, 2)])
def test_a_shard_out_of_range_is_refused(shard: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match=f"got {shard[0]}/{shard[1]}"):
        Extent(1, shard=shard)
