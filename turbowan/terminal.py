"""What programs on a terminal share: errors as one line and an exit code, warnings as notes, a line of progress."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from .errors import Note, Stopped, TurbowanError


@contextmanager
def exit_codes(program: str) -> Iterator[None]:
    """Around a program's work: an error raised on purpose ends it with one line on standard error and exit code 2
    (bad input, or a machine that cannot), Ctrl-C with exit code 130. Our notes become a line each, other warnings none.
    """

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, Note) and os.environ.get("RANK", "0") == "0":  # torchrun's other processes say the same
            print(f"{program}: note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        except TurbowanError as error:
            print(f"{program}: {error}", file=sys.stderr)
            sys.exit(2)
        except (KeyboardInterrupt, Stopped):
            print(f"{program}: stopped", file=sys.stderr)
            sys.exit(130)


@contextmanager
def between_steps() -> Iterator[Callable[[], None]]:
    """Ctrl-C ends the work between two steps: gives the function to call there. A second Ctrl-C ends it at once.

    Raises:
        Stopped: in place of KeyboardInterrupt, which libraries for command lines end with words and codes of their own.
    """
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield check
    except KeyboardInterrupt:
        raise Stopped from None
    finally:
        signal.signal(signal.SIGINT, before)


class At(Protocol):
    """Where a generation is, as the engine reports it."""

    @property
    def stage(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def unit(self) -> str: ...


class ProgressLine:
    """One line a stage on standard error, rewritten as it goes on, with its seconds; none where that is no terminal."""

    def __init__(self) -> None:
        self._stage, self._started = "", 0.0

    def __call__(self, at: At) -> None:
        if not sys.stderr.isatty():
            return
        if at.stage != self._stage:
            self._stage, self._started = at.stage, time.perf_counter()
        seconds = time.perf_counter() - self._started
        end = "\n" if at.done >= at.total else ""
        print(f"\r{at.stage:<10}{_count(at, seconds)}\033[K", end=end, file=sys.stderr, flush=True)


def _count(at: At, seconds: float) -> str:
    """3/4  1.2 s, or of bytes 6.2/14.3 GB  2.1 GB/s."""
    if at.unit != "bytes":
        return f"{at.done}/{at.total}  {seconds:.1f} s"
    scale, unit = (1e9, "GB") if at.total >= 1e9 else (1e6, "MB")
    done = at.done / scale
    return f"{done:.1f}/{at.total / scale:.1f} {unit}  {done / max(seconds, 1e-3):.1f} {unit}/s"
