"""Pictures in a terminal: by kitty's or iTerm2's protocol, else as half blocks in 24-bit colour.

Sources: kitty's "Terminal graphics protocol", iTerm2's "Inline images protocol".
"""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Mapping
from typing import TextIO

import numpy as np
from PIL import Image

ROWS = 12  # of text, at most
CELL = 2  # height of a character over its width, in nearly every font
KITTY_ID = 7471  # a picture sent under the same number takes the first one's place
KITTY_PIECE = 4096  # bytes of base64 in one command, at most


def protocol(environment: Mapping[str, str]) -> str | None:
    """ "kitty", "iterm", "blocks", or None where a terminal tells of no way to show colours as they are."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    blocks = "blocks" if environment.get("COLORTERM") in ("truecolor", "24bit") else None
    if term == "dumb":
        return None
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        return blocks  # these pass no pictures on
    if "KITTY_WINDOW_ID" in environment or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    return blocks


def fit(height: int, width: int, columns: int, rows: int) -> tuple[int, int]:
    """Columns and rows that show a picture as large as they allow, in its proportions."""
    wide = max(1, min(columns, round(CELL * rows * width / height)))
    return wide, max(1, min(rows, round(wide * height / width / CELL)))


def kitty(picture: np.ndarray, columns: int, rows: int) -> str:
    """uint8 [H, W, 3] over so many cells, the cursor staying where it is."""
    data = base64.b64encode(_png(picture)).decode()
    pieces = [data[i : i + KITTY_PIECE] for i in range(0, len(data), KITTY_PIECE)]
    controls = [f"a=T,f=100,i={KITTY_ID},p=1,q=2,C=1,c={columns},r={rows},", *([""] * (len(pieces) - 1))]
    more = [1] * (len(pieces) - 1) + [0]
    return "".join(f"\x1b_G{c}m={m};{piece}\x1b\\" for c, m, piece in zip(controls, more, pieces, strict=True))


def iterm(picture: np.ndarray, columns: int, rows: int) -> str:
    """As `kitty`."""
    data = _png(picture)
    how = f"inline=1;size={len(data)};width={columns};height={rows};preserveAspectRatio=0;doNotMoveCursor=1"
    return f"\x1b]1337;File={how}:{base64.b64encode(data).decode()}\a"


def blocks(picture: np.ndarray, columns: int, rows: int) -> str:
    """As lines of half blocks, two pixels each; the cursor ends after the last."""
    small = np.asarray(Image.fromarray(picture).resize((columns, 2 * rows), Image.Resampling.BOX))

    def cell(upper: np.ndarray, lower: np.ndarray) -> str:
        return "\x1b[38;2;{};{};{};48;2;{};{};{}m\u2580".format(*upper, *lower)

    lines = ("".join(map(cell, small[2 * i], small[2 * i + 1])) for i in range(rows))
    return "\n".join(line + "\x1b[0m" for line in lines)


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


class TerminalPicture:
    """A picture above the line that is being written, replaced by the next one.

    Args:
        terminal: shows nothing where this is none, or one without colours.
    """

    def __init__(self, terminal: TextIO, environment: Mapping[str, str] = os.environ) -> None:
        self._terminal = terminal
        self._protocol = protocol(environment) if terminal.isatty() else None
        self._rows = 0  # of the picture shown last

    def show(self, picture: np.ndarray, again: bool) -> None:
        """Draw uint8 [H, W, 3], `again` in the last one's place, with the cursor on the line below it at the end."""
        if self._protocol is None:
            return
        size = shutil.get_terminal_size()
        height, width = picture.shape[:2]
        columns, rows = fit(height, width, max(1, size.columns - 1), max(1, min(ROWS, size.lines - 3)))
        above = self._rows if again else 0
        text = "\r\x1b[K" + (f"\x1b[{above}A" if above else "")
        if self._protocol == "blocks":
            text += blocks(picture, columns, rows) + "\n"
        else:  # room first: at the bottom of the screen a picture would be cut off
            draw = kitty if self._protocol == "kitty" else iterm
            text += "\n" * rows + f"\x1b[{rows}A" + draw(picture, columns, rows) + "\n" * rows
        self._terminal.write(text)
        self._terminal.flush()
        self._rows = rows
