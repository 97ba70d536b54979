"""What users of any program see: one line and an exit code for an error, notes, a line of progress on a terminal."""

from __future__ import annotations

import io
import sys
import warnings

import pytest

from turbowan.engine import Progress
from turbowan.errors import MachineError, MediaError, Note, RequestError
from turbowan.terminal import ProgressLine, exit_codes


@pytest.mark.parametrize("error", [RequestError, MediaError, MachineError])
def test_an_error_is_one_line_and_exit_code_2(error, capsys):
    with pytest.raises(SystemExit) as stop, exit_codes("program"):
        raise error("80 frames are no 4k+1")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "program: 80 frames are no 4k+1\n")


def test_ctrl_c_is_exit_code_130(capsys):
    with pytest.raises(SystemExit) as stop, exit_codes("program"):
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err == "program: stopped\n"


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError), exit_codes("program"):
        raise ZeroDivisionError


def test_warnings_for_users_become_notes_and_others_stay_silent(capsys):
    before = warnings.showwarning
    with exit_codes("program"):
        warnings.simplefilter("always")
        warnings.warn("four steps are few", Note, stacklevel=1)
        warnings.warn("somebody else's", UserWarning, stacklevel=1)
        warnings.warn("old name", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "program: note: four steps are few\n"
    assert warnings.showwarning is before


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_under_torchrun_a_note_comes_once(monkeypatch, capsys, rank: str, lines: int):
    monkeypatch.setenv("RANK", rank)
    with exit_codes("program"):
        warnings.simplefilter("always")
        warnings.warn("four steps are few", Note, stacklevel=1)
    assert capsys.readouterr().err.count("note: four steps are few") == lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_progress_is_one_line_a_stage_on_a_terminal_only(monkeypatch, stream: io.StringIO):
    monkeypatch.setattr(sys, "stderr", stream)
    line = ProgressLine()
    for at in [Progress("text", 0, 1), Progress("text", 1, 1), *(Progress("denoise", i, 4) for i in range(5))]:
        line(at)
    shown = stream.getvalue()
    if not stream.isatty():
        assert shown == ""
        return
    assert shown.count("\n") == 2
    assert [part.split("\r")[-1].split()[:2] for part in shown.split("\n")[:2]] == [["text", "1/1"], ["denoise", "4/4"]]


def test_bytes_are_shown_with_their_rate(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    now = 10.0
    monkeypatch.setattr("turbowan.terminal.time.perf_counter", lambda: now)
    line = ProgressLine()
    line(Progress("load", 0, 14_300_000_000, "bytes"))
    now += 2.95
    line(Progress("load", 6_200_000_000, 14_300_000_000, "bytes"))
    assert "load      6.2/14.3 GB  2.1 GB/s" in stream.getvalue()
    line(Progress("load", 1_000_000, 2_500_000, "bytes"))
    assert "1.0/2.5 MB" in stream.getvalue()
