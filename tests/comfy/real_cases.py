"""Cases that run one after another on something real, each with a line that says how it went."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from real_server import Server


def parser(about: str | None) -> argparse.ArgumentParser:
    """The command line that all of them have."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("folder", nargs="?", type=Path, help="ComfyUI's folder")
    made.add_argument("--python", type=Path, help="an interpreter with ComfyUI's packages")
    made.add_argument("-k", default="", help="only cases with this, or one of WORD,WORD,…, in their name")
    made.add_argument("--flag", action="append", default=[], help="one more of ComfyUI's own: --flag=--novram")
    return made


def wanted(only: str, name: str) -> bool:
    return any(word in name for word in only.split(","))


class Cases(list[Callable[..., str]]):
    """Functions that raise where something is wrong and return a few words where nothing is; also their decorator."""

    def __call__(self, function: Callable[..., str]) -> Callable[..., str]:
        self.append(function)
        return function

    def run(self, server: Server, *subjects: Any, only: str = "") -> int:
        """Run those with one of the words of `only` in their name; how many failed."""
        failed = 0
        for case in self:
            if not wanted(only, case.__name__):
                continue
            started = time.monotonic()
            try:
                result = case(*subjects)
                print(f"ok    {case.__name__} ({time.monotonic() - started:.1f} s): {result}", flush=True)
            except Exception as error:
                failed += 1
                took = time.monotonic() - started
                print(f"FAIL  {case.__name__} ({took:.1f} s): {type(error).__name__}: {error}", flush=True)
                traceback.print_exc()
                print(server.log.read_text()[-3000:])
        return failed
