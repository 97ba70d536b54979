"""Each protocol's text, read back by its own rules, is the picture; a terminal of which nothing is known gets none."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from turbowan.media.terminal_picture import TerminalPicture, blocks, fit, iterm, kitty, protocol


def picture(height: int = 40, width: int = 66) -> np.ndarray:
    return np.random.default_rng().integers(0, 256, (height, width, 3), dtype=np.uint8)


def read_png(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app", "COLORTERM": "truecolor"}, "iterm"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "screen", "KITTY_WINDOW_ID": "1", "COLORTERM": "24bit"}, "blocks"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, None),
        ({}, None),
    ],
)
def test_terminals_are_told_by_their_environment(environment, found):
    assert protocol(environment) == found


@pytest.mark.parametrize("size", [(3, 5), (40, 66), (100, 200)])
def test_kitty_pieces_are_one_png(size):
    given = picture(*size)
    text = kitty(given, 20, 6)
    commands = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert "".join(f"\x1b_G{c};{d}\x1b\\" for c, d in commands) == text
    first = dict(pair.split("=") for pair in commands[0][0].split(","))
    assert {"a": "T", "f": "100", "c": "20", "r": "6", "C": "1", "q": "2"}.items() <= first.items()
    assert [c.split("m=")[1] for c, _ in commands] == ["1"] * (len(commands) - 1) + ["0"]
    assert all(len(d) <= 4096 and len(d) % 4 == 0 for _, d in commands)
    assert np.array_equal(read_png("".join(d for _, d in commands)), given)


def test_iterm_is_one_png():
    given = picture()
    how, data = re.fullmatch(r"\x1b\]1337;File=([^:]*):(.*)\a", iterm(given, 20, 6)).groups()
    values = dict(pair.split("=") for pair in how.split(";"))
    assert {"inline": "1", "width": "20", "height": "6", "doNotMoveCursor": "1"}.items() <= values.items()
    assert int(values["size"]) == len(base64.b64decode(data))
    assert np.array_equal(read_png(data), given)


def test_blocks_are_two_pixels_each():
    given = picture(12, 20)
    lines = blocks(given, 20, 6).split("\n")
    colours = [re.findall(r"38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m", line) for line in lines]
    cells = np.array(colours, dtype=int).reshape(6, 20, 2, 3).transpose(0, 2, 1, 3).reshape(12, 20, 3)
    assert np.array_equal(cells, given)


def test_proportions_are_kept_within_the_room():
    assert fit(100, 200, 80, 12) == (48, 12)
    assert fit(100, 200, 20, 12) == (20, 5)
    assert fit(2000, 10, 80, 12) == (1, 12)
    assert fit(10, 20_000, 80, 12) == (80, 1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def last_line(text: str) -> int:
    """The line where the cursor ends, counted from where it began."""
    return text.count("\n") - sum(int(n) for n in re.findall(r"\x1b\[(\d+)A", text))


@pytest.mark.parametrize("kind", [{"TERM": "xterm-kitty"}, {"LC_TERMINAL": "iTerm2"}, {"COLORTERM": "truecolor"}])
def test_a_picture_takes_the_last_ones_place(kind, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "30")
    terminal = Terminal()
    shown = TerminalPicture(terminal, kind)
    shown.show(picture(40, 80), again=False)
    first = last_line(terminal.getvalue())
    assert first == 12
    for _ in range(3):
        shown.show(picture(40, 80), again=True)
        assert last_line(terminal.getvalue()) == first
    shown.show(picture(40, 80), again=False)
    assert last_line(terminal.getvalue()) == 2 * first


def test_files_and_plain_terminals_get_nothing():
    for terminal, environment in ((io.StringIO(), {"TERM": "xterm-kitty"}), (Terminal(), {"TERM": "xterm"})):
        TerminalPicture(terminal, environment).show(picture(), again=False)
        assert terminal.getvalue() == ""
