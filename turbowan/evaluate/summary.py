"""From every prompt's numbers to a few: shares, differences, ratios and means, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .interval import difference, mean, ratio, share

RATIOS = ("travel", "change", "diversity")  # measures that are compared as a ratio


def summarise(part: Mapping[str, Any]) -> dict[str, Any]:
    """Of a report's part (see `report`), per case: shares right, means, and all that compares it with the reference.

    Returns:
        name -> right: point -> share. wrong_by: point -> answer -> how often it was missed. Measures: means.
        psnr_less_vae: mean of psnr - vae_psnr. against, of all but the reference: right (point -> difference in points,
        with discordant pairs), and ratios of measures.
    """
    cases, answers = part["cases"], part["answers"]
    reference = cases.get(part["against"])
    summary = {}
    for name, case in cases.items():
        right, values = case["right"], case["values"]
        found: dict[str, Any] = {
            "right": {point: share(sum(marks), len(marks)) for point, marks in right.items()},
            "wrong_by": {point: _missed(answers[point], right[point]) for point in right if point in answers},
            **{measure: mean(numbers) for measure, numbers in values.items()},
        }
        if "psnr" in values:
            found["psnr_less_vae"] = mean(list(map(_minus, values["psnr"], values["vae_psnr"])))
        if reference is not None and name != part["against"]:
            theirs = reference["values"]
            found["against"] = {
                "right": {point: difference(marks, reference["right"][point]) for point, marks in right.items()},
                **{key: ratio(values[key], theirs[key]) for key in RATIOS if key in values and key in theirs},
            }
        summary[name] = found
    return summary


def _missed(answers: Sequence[str], right: Sequence[bool]) -> dict[str, int]:
    missed = [answer for answer, ok in zip(answers, right, strict=True) if not ok]
    return {answer: missed.count(answer) for answer in sorted(set(missed))}


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def table(part: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for people: a line a case. Shares and ratios in percent, intervals of 95 % in brackets."""
    summary, against = part["summary"], part["against"]
    points = [point for point in next(iter(summary.values()))["right"] if point != "all"]
    compared = against in summary and len(summary) > 1
    measures = {
        "travel": "travel", "change": "change", "diversity": "diversity", "error": "latent error", "psnr": "frame 0 dB",
        "vae_psnr": "VAE dB", "psnr_less_vae": "less VAE's", "frames_psnr": f"frames to {against}, dB",
    }  # fmt: skip
    shown = [measure for measure in measures if any(measure in found for found in summary.values())]
    header = ["case", "right %"]
    header += [f"points to {against} (b, c)"] if compared else []
    header += [*(points if len(points) > 1 else []), *(measures[measure] for measure in shown)]
    rows = []
    for name, found in summary.items():
        right, other = found["right"], found.get("against")
        row = [name, _interval(right["all"], "share", 100, "{:.1f}")]
        if compared:
            row.append("" if other is None else _points(other["right"]["all"]))
        if len(points) > 1:
            row += [f"{100 * right[point]['share']:.1f}" for point in points]
        row += [_measure(found.get(measure), (other or {}).get(measure), measure) for measure in shown]
        rows.append(row)
    return header, rows


def _interval(found: Mapping[str, float | None], key: str, scale: float, form: str) -> str:
    value, *ends = (form.format(scale * end) for name in (key, "low", "high") if (end := found[name]) is not None)
    return f"{value} ({' to '.join(ends)})" if ends else value


def _points(found: Mapping[str, float | None]) -> str:
    return f"{_interval(found, 'points', 1, '{:+.1f}')}; {found['b']}, {found['c']}"


def _measure(value: Mapping[str, float | None] | None, relative: Mapping[str, float | None] | None, name: str) -> str:
    if value is None:
        return ""
    if "psnr" in name:
        return f"{value['mean']:.2f}"
    if relative is None:
        return f"{value['mean']:.3g}"
    return f"{value['mean']:.3g} = {_interval(relative, 'ratio', 100, '{:.0f}')} %"
