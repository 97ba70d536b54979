"""Lines of JSON that survive a kill, and their picture."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from turbowan.errors import CheckpointError
from turbowan.train import curve


def test_lines_are_added_read_and_cut(tmp_path):
    path = tmp_path / "curve.jsonl"
    assert curve.read(path) == []
    for step in (10, 20, 30):
        curve.add(path, {"step": step, "loss": 1 / step, "norm": math.nan if step == 20 else 2.0})
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # a kill
    assert [(line["step"], line["norm"]) for line in curve.read(path)] == [(10, 2.0), (20, None), (30, 2.0)]
    curve.cut(path, 20)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]
    with pytest.raises(CheckpointError, match="cannot write"):
        curve.add(tmp_path / "none" / "curve.jsonl", {"step": 1})


def test_a_line_is_printed_too(tmp_path, capsys):
    curve.log(tmp_path / "curve.jsonl", {"step": 3, "loss": 0.1234567, "norm": math.inf})
    assert capsys.readouterr().out == "step 3  loss 0.12346  norm inf\n"
    assert curve.read(tmp_path / "curve.jsonl") == [{"step": 3, "loss": 0.1234567, "norm": None}]


def ink(path, row: int) -> np.ndarray:
    """Where the moving mean runs in a panel: the mean height of its colour by column, NaN where there is none."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=int)[220 * row : 220 * (row + 1)]
    drawn = np.abs(pixels - np.array(curve._SMOOTH)).sum(axis=2) == 0
    return np.array([np.flatnonzero(column).mean() if column.any() else np.nan for column in drawn.T])


def test_the_picture_shows_each_value_over_the_steps(tmp_path):
    lines = [
        {"step": step, "seconds": 1.0, "up": step - 50.0, "decay": math.exp(-step / 20), "never": 0.0}
        for step in range(1, 101)
    ]
    lines[40]["up"] = None
    curve.plot(lines, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size == (900, 440)  # what is always 0 has no panel
    for row, sign in ((0, -1), (1, 1)):  # a line that rises, and one that falls straight on a logarithmic scale
        heights = ink(tmp_path / "curve.png", row)
        inside = heights[150:850]
        slope = np.diff(inside)
        assert np.isfinite(inside).all()
        assert abs(slope.mean() - sign * 168 / 804) < 0.03
        assert np.abs(inside - np.linspace(inside[0], inside[-1], len(inside))).max() < 3


@pytest.mark.parametrize("lines", [[], [{"step": 1, "seconds": 0.1, "loss": 2.0}], [{"step": 1, "loss": None}]])
def test_a_short_curve_can_be_drawn(tmp_path, lines):
    curve.plot(lines, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[0] == 900
