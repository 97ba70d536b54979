"""Reports written, read and added up."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from turbowan.errors import RequestError
from turbowan.evaluate.report import join, read_report, write_report
from turbowan.evaluate.summary import summarise

TEXTS = ['a "red" [ring]\nmoves', "{two}", "三", "four", "[ 5 ]", "six"]


def whole(seed: int) -> dict[str, Any]:
    """A report of three cases over six prompts, of made-up numbers."""
    rng = random.Random(seed)

    def case(diverse: bool) -> dict[str, Any]:
        direction = [rng.random() < 0.5 for _ in TEXTS]
        values: dict[str, list[float | None]] = {"travel": [rng.random(), None, *(rng.random() for _ in range(4))]}
        if diverse:
            values["diversity"] = [rng.random(), None, None, rng.random(), None, None]
        right = {"direction": direction, "all": direction}
        return {"facts": {"steps": rng.randrange(9)}, "right": right, "values": values}

    part = {
        "asked": {"scene_seed": 1, "prompts": 6, "seed": 0},
        "against": "a",
        "rows": list(range(6)),
        "texts": TEXTS,
        "answers": {"direction": ["left", "still", "up", "left", "up", "down"]},
        "cases": {"world": case(False), "a": case(True), "b": case(True)},
    }
    return {"command": "made up", "parts": {"shapes": {**part, "summary": summarise(part)}}}


def cut(report: dict[str, Any], start: int, stop: int, *names: str) -> dict[str, Any]:
    """Some prompts and cases of a report."""
    part = report["parts"]["shapes"]
    kept = {
        name: {
            "facts": case["facts"],
            **{kind: {key: column[start:stop] for key, column in case[kind].items()} for kind in ("right", "values")},
        }
        for name, case in part["cases"].items()
        if name in names
    }
    for case in kept.values():
        case["values"] = {key: column for key, column in case["values"].items() if set(column) != {None}}
    rest = {key: part[key][start:stop] for key in ("rows", "texts")}
    answers = {key: column[start:stop] for key, column in part["answers"].items()}
    smaller = {**part, **rest, "answers": answers, "cases": kept}
    return {**report, "parts": {"shapes": {**smaller, "summary": summarise(smaller)}}}


def test_a_report_comes_back_as_it_was_written(tmp_path: Path) -> None:
    report = whole(1)
    path = tmp_path / "report.json"
    write_report(report, path)
    assert read_report(path) == {"format": 1, **report}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert '   "rows": [0, 1, 2, 3, 4, 5],' in lines  # one line, for people and for diffs
    assert json.loads(path.read_text(encoding="utf-8"))["parts"]["shapes"]["texts"] == TEXTS


def test_parts_make_up_the_whole(fresh_seed: int, tmp_path: Path) -> None:
    report = whole(fresh_seed)
    names = ("world", "a", "b")
    by_prompt = [cut(report, 4, 6, *names), cut(report, 0, 1, *names), cut(report, 1, 4, *names)]
    by_case = [cut(report, 0, 6, "world", "a"), cut(report, 0, 6, "world", "b")]
    both = [cut(report, 0, 3, *names), cut(report, 3, 6, "a"), cut(report, 3, 6, "b", "world")]
    for parts in (by_prompt, by_case, both, [report]):
        assert join(parts)["parts"] == report["parts"]
    assert join(by_case)["joined"] == [{"command": "made up"}] * 2
    for i, part in enumerate(by_prompt):
        write_report(part, tmp_path / f"{i}.json")
    joined = join([read_report(tmp_path / f"{i}.json") for i in range(3)])
    write_report(joined, tmp_path / "all.json")
    assert read_report(tmp_path / "all.json")["parts"] == report["parts"]


def test_the_reference_may_be_another() -> None:
    report = whole(3)
    part = join([report], against="b")["parts"]["shapes"]
    assert part["against"] == "b"
    assert "against" in part["summary"]["a"]
    assert "against" not in part["summary"]["b"]


def test_nearness_to_another_case_is_left_out() -> None:
    report = whole(7)
    part = report["parts"]["shapes"]
    part["cases"]["b"]["values"]["frames_psnr"] = [30.0] * 6
    assert join([report])["parts"]["shapes"]["summary"]["b"]["frames_psnr"]["mean"] == 30
    assert "frames_psnr" not in join([report], "b")["parts"]["shapes"]["cases"]["b"]["values"]


def test_what_does_not_belong_together_is_refused() -> None:
    report = whole(4)
    names = ("world", "a", "b")
    first, second = cut(report, 0, 3, *names), cut(report, 3, 6, *names)

    other = deepcopy(second)
    other["parts"]["shapes"]["asked"]["seed"] = 5
    with pytest.raises(RequestError, match="did not ask the same shapes: seed 0 and 5"):
        join([first, other])
    other = deepcopy(second)
    other["parts"]["shapes"]["cases"]["a"]["facts"] = {"steps": 99}
    with pytest.raises(RequestError, match=r"case 'a' is not the same in all reports: \{'steps': 99\}"):
        join([first, other])
    other = deepcopy(first)
    other["parts"]["shapes"]["cases"]["b"]["values"]["travel"][2] = 7.0
    with pytest.raises(RequestError, match="prompt 2 of case 'b' is in two reports with other numbers"):
        join([first, second, other])
    with pytest.raises(RequestError, match="case 'b' lacks 3 of 6 prompts, first 3"):
        join([first, cut(report, 3, 6, "world", "a")])


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, content, line in (
        ("a.json", "{", "is not a readable report"),
        ("b.json", "[]", "is not a report"),
        ("c.json", '{"format": 2, "parts": {}}', "is not a report"),
        ("d.json", None, "is not a readable report"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        with pytest.raises(RequestError, match=rf"{name} {line}") as error:
            read_report(path)
        assert "\n" not in str(error.value)
