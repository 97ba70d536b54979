"""Summaries worked out by hand, and the table people read."""

from __future__ import annotations

import pytest

from turbowan.evaluate.summary import summarise, table

PART = {
    "against": "teacher",
    "answers": {"colour": ["red", "blue", "red", "red"], "direction": ["left", "up", "left", "down"]},
    "cases": {
        "teacher": {
            "right": {
                "colour": [True, True, True, False], "direction": [True, True, False, True],
                "all": [True, True, False, False],
            },
            "values": {
                "travel": [1.0, 2.0, None, 1.0], "error": [0.0, None, None, None], "psnr": [30.0, 20.0, 30.0, 20.0],
                "vae_psnr": [31.0, 22.0, 31.0, 22.0],
            },
        },
        "student": {
            "right": {
                "colour": [True, False, True, False], "direction": [True, True, True, True],
                "all": [True, False, True, False],
            },
            "values": {"travel": [0.5, 1.0, 9.0, None], "change": [0.1] * 4},
        },
    },
}  # fmt: skip


def test_by_hand() -> None:
    summary = summarise(PART)
    teacher, student = summary["teacher"], summary["student"]
    assert teacher["right"]["colour"]["share"] == 0.75
    assert teacher["wrong_by"] == {"colour": {"red": 1}, "direction": {"left": 1}}
    assert student["wrong_by"] == {"colour": {"blue": 1, "red": 1}, "direction": {}}
    assert teacher["travel"]["mean"] == pytest.approx(4 / 3)
    assert teacher["travel"]["total"] == 3
    assert teacher["psnr_less_vae"]["mean"] == pytest.approx(-1.5)
    assert "against" not in teacher
    found = student["against"]
    assert [found["right"]["all"][key] for key in ("points", "b", "c", "total")] == [0.0, 1, 1, 4]
    assert [found["right"]["colour"][key] for key in ("points", "b", "c")] == [-25.0, 0, 1]
    assert found["travel"] == {"ratio": 0.5, "low": 0.5, "high": 0.5, "total": 2}
    assert "change" not in found  # the reference lacks it


def test_a_measure_of_one_prompt_has_no_interval() -> None:
    cases = {
        name: {"right": {"all": [True], "direction": [True]}, "values": {"travel": [travel]}}
        for name, travel in (("teacher", 1.0), ("student", 2.0))
    }
    one = {"cases": cases, "answers": {"direction": ["left"]}, "against": "teacher"}
    summary = summarise(one)
    assert summary["student"]["against"]["travel"] == {"ratio": 2.0, "low": None, "high": None, "total": 1}
    header, rows = table({**one, "summary": summary})
    assert dict(zip(header, rows[1], strict=True))["travel"] == "2 = 200 %"


def test_a_reference_that_is_not_there_is_not_compared_with() -> None:
    summary = summarise({**PART, "against": "world"})
    assert all("against" not in found for found in summary.values())
    header, rows = table({**PART, "against": "world", "summary": summary})
    assert not any("points" in name for name in header)
    assert [row[0] for row in rows] == ["teacher", "student"]


def test_a_table_has_a_line_for_each_case() -> None:
    header, rows = table({**PART, "summary": summarise(PART)})
    teacher, student = (dict(zip(header, row, strict=True)) for row in rows)
    assert header[:3] == ["case", "right %", "points to teacher (b, c)"]
    assert teacher["right %"].startswith("50.0 (15.0 to 85.0)")
    assert teacher["points to teacher (b, c)"] == ""
    assert student["points to teacher (b, c)"].endswith("; 1, 1")
    assert student["points to teacher (b, c)"].startswith("+0.0 (-")
    assert (teacher["colour"], student["direction"]) == ("75.0", "100.0")
    assert (teacher["travel"], student["travel"]) == ("1.33", "3.5 = 50 (50 to 50) %")
    assert (teacher["frame 0 dB"], teacher["less VAE's"], student["frame 0 dB"]) == ("25.00", "-1.50", "")
