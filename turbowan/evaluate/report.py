"""Reports as files, and several of them as one.

A report is {"format", facts of the run, "parts"}. A part, one kind of question, has

    asked     what makes the same questions and noise again: seeds, counts, size
    against   the case that the others are compared with
    rows      the numbers of its prompts; texts and answers (point -> what is right) have one entry for each
    cases     name -> {"facts": settings, "right": point -> booleans, "values": measure -> numbers or null}
    summary   see `summarise`

Measures, of each prompt: travel and change (how much moves, where the prompt asks for motion), diversity (distance of
clips of other noise), error (of the latent, relative), psnr and vae_psnr (dB, of the first frame and of the VAE alone),
frames_psnr (dB, of all frames to those of the case `against`, from the same noise).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.files import replacing
from ..errors import RequestError
from .summary import summarise

FORMAT = 1


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """As JSON, lists of numbers on one line each; whole or not at all."""
    text = json.dumps({"format": FORMAT, **report}, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda found: "[" + re.sub(r"\n\s+", " ", found[1]) + "]", text)
    with replacing(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_report(path: Path) -> dict[str, Any]:
    """A report from its file.

    Raises:
        RequestError: the file is missing, or no report of this format.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} is not a readable report ({' '.join(str(error).split())})") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise RequestError(f"{path} is not a report of `turbowan evaluate prompts` or `i2v`, format {FORMAT}")
    return report


def join(reports: Sequence[Mapping[str, Any]], against: str | None = None) -> dict[str, Any]:
    """One report from several: of other prompts (shards), or of other cases over the same prompts.

    Args:
        against: the case that the others are compared with; the first report's by default.

    Raises:
        RequestError: they did not ask the same, settings of a case differ, a prompt's numbers are there twice and
            differ, or at the end a case lacks prompts that another has.
    """
    names = list(dict.fromkeys(what for report in reports for what in report["parts"]))
    parts = {
        what: _join_parts(what, [r["parts"][what] for r in reports if what in r["parts"]], against) for what in names
    }
    facts = [{key: value for key, value in report.items() if key not in ("format", "parts")} for report in reports]
    return {"joined": facts, "parts": parts}


def _join_parts(what: str, parts: Sequence[Mapping[str, Any]], against: str | None) -> dict[str, Any]:
    asked = parts[0]["asked"]
    for part in parts:
        other = part["asked"]
        differing = [key for key in {**asked, **other} if asked.get(key) != other.get(key)]
        if differing:
            told = ", ".join(f"{key} {asked.get(key)} and {other.get(key)}" for key in differing)
            raise RequestError(f"the reports did not ask the same {what}: {told}")
    rows = sorted({row for part in parts for row in part["rows"]})
    against = against or parts[0]["against"]
    by_row: dict[int, dict[str, Any]] = {}
    for part in parts:
        for i, row in enumerate(part["rows"]):
            by_row[row] = {"text": part["texts"][i], **{point: names[i] for point, names in part["answers"].items()}}
    names = list(dict.fromkeys(name for part in parts for name in part["cases"]))
    joined = {
        "asked": asked,
        "against": against,
        "rows": rows,
        "texts": [by_row[row]["text"] for row in rows],
        "answers": {point: [by_row[row][point] for row in rows] for point in parts[0]["answers"]},
        "cases": {name: _join_case(name, rows, [p for p in parts if name in p["cases"]], against) for name in names},
    }
    return {**joined, "summary": summarise(joined)}


def _join_case(name: str, rows: Sequence[int], parts: Sequence[Mapping[str, Any]], against: str) -> dict[str, Any]:
    first = parts[0]["cases"][name]
    found: dict[int, dict[tuple[str, str], Any]] = {}
    for part in parts:
        case = part["cases"][name]
        if case["facts"] != first["facts"]:
            raise RequestError(f"case '{name}' is not the same in all reports: {case['facts']} and {first['facts']}")
        for i, row in enumerate(part["rows"]):
            numbers = {(kind, key): case[kind][key][i] for kind in ("right", "values") for key in case[kind]}
            if part["against"] != against:
                numbers.pop(("values", "frames_psnr"), None)  # it says how near another case's frames are
            if found.setdefault(row, numbers) != numbers:
                raise RequestError(f"prompt {row} of case '{name}' is in two reports with other numbers; leave one out")
    lacking = [row for row in rows if row not in found]
    if lacking:
        raise RequestError(f"case '{name}' lacks {len(lacking)} of {len(rows)} prompts, first {lacking[0]}; give all")
    keys = list(dict.fromkeys(key for numbers in found.values() for key in numbers))
    columns = {key: [found[row].get(key) for row in rows] for key in keys}
    return {
        "facts": first["facts"],
        "right": {key: column for (kind, key), column in columns.items() if kind == "right"},
        "values": {key: column for (kind, key), column in columns.items() if kind == "values"},
    }
