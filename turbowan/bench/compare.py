"""Whether a measurement got slower than a recorded one, or fails where that one ran."""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import inf
from pathlib import Path
from typing import Any

from ..errors import RequestError

NOT_STANDING = ("profile", "sweep-", "trials-")  # how files begin that hold what was tried, not what runs
Key = tuple[str, str, str]  # bench, case, GPU


def read_records(paths: Iterable[Path]) -> dict[Key, dict[str, Any]]:
    """Records with a median, by bench, case and GPU; of several runs of one case the fastest. A case that failed in
    all of them keeps its record, with "failed" and no "ms".

    Args:
        paths: files of JSON lines, or folders of `.jsonl` files, of which those of NOT_STANDING are left out. Lines
            that are no such records are passed over.

    Raises:
        RequestError: a file cannot be read, or a line is no record.
    """
    found: dict[Key, dict[str, Any]] = {}
    for file in (file for path in paths for file in _files(path)):
        try:
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise RequestError(f"{file} is no file of JSON lines, as --json prints them ({error})") from error
        for record in lines:
            whole = isinstance(record, dict) and {"bench", "case", "gpu"} <= record.keys()
            if whole and ("ms" in record or "failed" in record):
                key = (record["bench"], record["case"], record["gpu"])
                if key not in found or _median(record) < _median(found[key]):
                    found[key] = record
    return found


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.glob("*.jsonl")) if not file.name.startswith(NOT_STANDING)]


def _median(record: dict[str, Any]) -> float:
    """Milliseconds; infinite where the case failed."""
    return float(record["ms"]["p50"]) if "ms" in record else inf


def compare(new: Iterable[Path], old: Iterable[Path], tolerance: float) -> tuple[list[dict[str, Any]], int]:
    """Recorded cases with what became of them, and how many of them got worse.

    Args:
        tolerance: how much longer a case may take: 0.05 is 5 %.

    Returns:
        A row for each case that both have, with the ratio of the medians and a verdict: "ok", "slower", or "failed" and
        why; and after them a row, "missing", for each that the new files lack though they hold others of the same
        bench, GPU, and shape or size (a case's first word). Where there is no new median it is None, as is the ratio.
        The count is of "slower" and "failed": a part of a bench may be measured alone.

    Raises:
        RequestError: nothing in common.
    """
    before = {key: record for key, record in read_records(old).items() if "ms" in record}
    after = read_records(new)
    both = [key for key in after if key in before]
    if not both:
        counts = f"{len(after)} new and {len(before)} recorded cases"
        raise RequestError(f"the {counts} have none in common (bench, case, GPU)")
    rows = [_row(key, before[key], after[key], tolerance) for key in both]
    groups = {_group(key) for key in after}
    rows += [_row(key, before[key], None, tolerance) for key in before if key not in after and _group(key) in groups]
    return rows, sum(row["verdict"] in ("slower", "failed") for row in rows)


def _group(key: Key) -> Key:
    """What is measured together."""
    bench, case, gpu = key
    return bench, case.split(" ")[0], gpu


def _row(key: Key, before: dict[str, Any], after: dict[str, Any] | None, tolerance: float) -> dict[str, Any]:
    median = before["ms"]["p50"]
    row = {"bench": key[0], "case": key[1], "before_ms": median, "after_ms": None, "ratio": None}
    if after is None:
        return row | {"verdict": "missing"}
    if "ms" not in after:
        return row | {"verdict": "failed", "failed": after["failed"]}
    ratio = round(after["ms"]["p50"] / median, 3)
    return row | {
        "after_ms": after["ms"]["p50"], "ratio": ratio, "verdict": "slower" if ratio > 1 + tolerance else "ok",
    }  # fmt: skip
