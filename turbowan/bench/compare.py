"""Whether a measurement got slower than a recorded one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import RequestError


def read_records(paths: Iterable[Path]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Records with a median, by bench, case and GPU; of several runs of one case the fastest.

    Args:
        paths: files of JSON lines, or folders of `.jsonl` files. Lines that are no such records are passed over.

    Raises:
        RequestError: a file cannot be read, or a line is no record.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    files = [file for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    for file in files:
        try:
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise RequestError(f"{file} is no file of JSON lines ({error})") from error
        for record in lines:
            if isinstance(record, dict) and {"bench", "case", "gpu", "ms"} <= record.keys():
                key = (record["bench"], record["case"], record["gpu"])
                if key not in found or record["ms"]["p50"] < found[key]["ms"]["p50"]:
                    found[key] = record
    return found


def compare(new: Iterable[Path], old: Iterable[Path], tolerance: float) -> tuple[list[dict[str, Any]], int]:
    """Cases that both have, with the ratio of their medians, and how many are slower by more than the tolerance.

    Raises:
        RequestError: nothing in common.
    """
    before, after = read_records(old), read_records(new)
    both = [key for key in after if key in before]
    if not both:
        counts = f"{len(after)} new and {len(before)} recorded cases"
        raise RequestError(f"the {counts} have none in common (bench, case, GPU)")
    rows = [
        {
            "bench": key[0], "case": key[1], "before_ms": before[key]["ms"]["p50"], "after_ms": after[key]["ms"]["p50"],
            "ratio": round(after[key]["ms"]["p50"] / before[key]["ms"]["p50"], 3),
        }
        for key in both
    ]  # fmt: skip
    return rows, sum(row["ratio"] > 1 + tolerance for row in rows)
