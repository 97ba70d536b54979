"""Times every configuration that a kernel's table could hold: what the choice of one is made by.

`python -m turbowan.bench.sweep attention 14B-480p 0/2` goes through the candidates of `bench/op_attention.py` (here
the first half): one JSON line each, what fails or hangs included.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from threading import Timer
from typing import Any

import torch

from ..terminal import exit_codes
from .case import Case
from .op import OPERATIONS, SHAPES, operation_module, time_case

PATIENCE = 90.0  # seconds for one configuration, compilation included


def sweep(
    candidates: Iterable[tuple[Case, Any]], part: tuple[int, int] = (0, 1), repeats: int = 10
) -> Iterator[dict[str, Any]]:
    """Time candidates one by one.

    Args:
        candidates: pairs of a case and its kernel's configuration, a dataclass or what to call its numbers.
        part: (i, n): only i, i + n, ... of them. repeats: timed calls of each.

    Returns:
        Records for JSON: the case's name as kernel, the configuration, and what `time_case` finds; or what failed.
    """
    for index, (case, config) in enumerate(candidates):
        if index % part[1] == part[0]:
            how = config if isinstance(config, dict) else {"kind": type(config).__name__, **asdict(config)}
            yield _timed({"kernel": case.name, "config": how}, case, repeats)


def _timed(what: dict[str, Any], case: Case, repeats: int) -> dict[str, Any]:
    """A kernel that hangs cannot be stopped: then this process says so and ends."""

    def give_up() -> None:
        print(json.dumps(what | {"failed": f"no result after {PATIENCE:g} s; the sweep ends here"}), flush=True)
        os._exit(3)

    timer = Timer(PATIENCE, give_up)
    timer.daemon = True
    timer.start()
    try:
        return what | time_case(case, repeats)
    finally:
        timer.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(prog="turbowan.bench.sweep", description=__doc__)
    parser.add_argument("what", choices=OPERATIONS)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("part", nargs="?", default="0/1", help="i/n: only the candidates i, i + n, ...")
    asked = parser.parse_args()
    index, _, count = asked.part.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        parser.error(f"the part must be i/n with 0 <= i < n, as 0/2, got '{asked.part}'")
    with exit_codes("turbowan.bench.sweep"), torch.inference_mode():
        candidates = operation_module(asked.what, asked.shape).candidates
        for record in sweep(candidates(asked.shape), (int(index), int(count))):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
