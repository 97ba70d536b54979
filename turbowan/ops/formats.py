"""Which format a transformer's linear layers run in where nobody asks for one (`--precision auto`): figures as data.

A file keeps its own format unless another one is faster by enough and adds no more than `BUDGET` to what the file
holds. Full-precision layers always stay: 8 bits are then the user's to ask for. So does everything on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .registry import OPERATIONS, Facts
from .rows import FORMATS

BUDGET = 0.015  # relative error of a linear layer on Gaussian numbers, against the file's weights in float32
GAIN_MEASURED = 1.1  # times the speed of the file's own format that a change must bring, by our own timings
GAIN_ON_PAPER = 3.0  # by peak rates alone, of which kernels may reach very different shares

# Error of a layer of 5120 inputs against the file's weights, by the format of its file and the one it runs in. Rows of
# 1536 inputs err up to 8 % less, of 13824 up to 6 % more. `whole_error` is the error against the file's own source.
ERRORS: dict[str, dict[str, float]] = {
    "bf16": {"bf16": 0.0017, "int8_row": 0.0124, "int8_block": 0.0132, "fp8_row": 0.0375},
    "int8_row": {"bf16": 0.0017, "int8_row": 0.0088, "int8_block": 0.0130, "fp8_row": 0.0374},
    "int8_block": {"bf16": 0.0017, "int8_row": 0.0123, "int8_block": 0.0093, "fp8_row": 0.0375},
    "fp8_row": {"bf16": 0.0017, "int8_row": 0.0125, "int8_block": 0.0132, "fp8_row": 0.0265},
}
_PRODUCTS = {
    "int8_row": "product_int8_rowwise", "int8_block": "product_int8_blockwise", "fp8_row": "product_fp8_rowwise",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """What is known of the GPUs of one compute capability.

    rates: by format, 10^12 operations a second, dense. measured: our kernels' own, in the shape 32760 x 5120 x 13824;
    else the peak of the chip that `source` names, with float32 sums. dtype: what "auto" computes the rest in.
    """

    rates: Mapping[str, float]
    source: str
    measured: bool = False
    dtype: torch.dtype = torch.bfloat16


def _peaks(whole: float, int8: float, fp8: float | None = None) -> dict[str, float]:
    """Scales per row and per block cost the tensor cores the same."""
    return {"bf16": whole, "int8_row": int8, "int8_block": int8, **({"fp8_row": fp8} if fp8 else {})}


# Peaks are those that comparison tables quote from the documents named; the documents themselves were not at hand.
ARCHITECTURES: dict[tuple[int, int], Architecture] = {
    (7, 5): Architecture(_peaks(65, 130), "NVIDIA's T4 datasheet", dtype=torch.float16),  # no bfloat16 in hardware
    (8, 0): Architecture(_peaks(312, 624), "NVIDIA's A100 datasheet"),
    (8, 9): Architecture(_peaks(165.2, 660.6, 330.3), "NVIDIA's Ada whitepaper, RTX 4090"),
    (9, 0): Architecture(
        {"bf16": 714, "int8_row": 1624, "int8_block": 1269, "fp8_row": 1492},
        "on an H200, docs/measurements.md",
        measured=True,
    ),
    (10, 0): Architecture(_peaks(2250, 4500, 4500), "NVIDIA's Blackwell technical brief, B200"),
    # a thirtieth of B200's int8; Triton makes plain instructions of it there (triton-lang/triton pull request 9773)
    (10, 3): Architecture(_peaks(2250, 150, 4500), "NVIDIA's Blackwell technical brief, B300"),
    (12, 0): Architecture(_peaks(209.5, 838, 419), "NVIDIA's RTX Blackwell whitepaper, RTX 5090"),
}


@dataclass(frozen=True)
class FormatChoice:
    """A format, and in one line why; measured: whether the reason rests on timings of that very architecture."""

    format: str
    why: str
    measured: bool = False


def architecture(capability: tuple[int, int]) -> Architecture | None:
    """The nearest known one that is not newer: of the same generation, else the first of an older one; or None."""
    older = [known for known in ARCHITECTURES if known <= capability]
    same = [known for known in older if known[0] == capability[0]]
    near = same or [known for known in older if known[1] == 0]
    return ARCHITECTURES[max(near)] if near else None


def compute_dtype(capability: tuple[int, int] | None) -> torch.dtype:
    """What "auto" computes in: float32 on a CPU (no capability), bfloat16 where a GPU has it, else float16."""
    if capability is None:
        return torch.float32
    known = architecture(capability)
    return torch.float16 if known is None else known.dtype


def choose_format(capability: tuple[int, int] | None, file_format: str, budget: float = BUDGET) -> FormatChoice:
    """What linear layers of a file run in under `--precision auto`. Pure but for the kernels that are offered here.

    Args:
        capability: of the GPU; None on a CPU.
        file_format: one of `ops.rows.FORMATS`; any other name (of layers that mix formats, say) is kept.
        budget: error that a change may add, as in `ERRORS`.
    """
    if capability is None:
        return FormatChoice(file_format, "the file's own: on a CPU always")
    if file_format not in FORMATS or file_format == "bf16":
        return FormatChoice(file_format, "the file's own: 8 bits only by request or where the file has them")
    known = architecture(capability)
    if known is None:
        return FormatChoice(file_format, "the file's own: no figures for so old a GPU")
    measured = known.measured and capability in ARCHITECTURES
    source = f"(measured {known.source})" if measured else f"(not measured, after {known.source})"
    errors = {name: error for name, error in ERRORS[file_format].items() if error <= budget}
    if not _has_kernel(file_format, capability):
        able = [name for name in errors if name != "bf16" and _has_kernel(name, capability)]
        if not able:
            return FormatChoice(file_format, f"the file's own, in plain PyTorch: 8 bits have no kernel here {source}")
        best = max(able, key=lambda name: (known.rates[name], -errors[name]))
        why = f"no kernel for the file's {file_format} here; {_error_text(file_format, best, budget)} {source}"
        return FormatChoice(best, why, measured)
    own = known.rates[file_format]
    able = [name for name in errors if name == "bf16" or _has_kernel(name, capability)]
    best = max(able, key=lambda name: (known.rates[name], -errors[name]), default=file_format)
    gain, needed = known.rates[best] / own, GAIN_MEASURED if measured else GAIN_ON_PAPER
    if gain < needed:
        return FormatChoice(
            file_format, f"the file's own: none within {budget:g} is {needed:g} times as fast {source}", measured
        )
    why = f"{gain:.2f} times as fast as the file's {file_format}; {_error_text(file_format, best, budget)} {source}"
    return FormatChoice(best, why, measured)


def whole_error(file_format: str, format: str) -> float:
    """Relative error of a layer of 5120 inputs against the weights that an 8-bit file was made from.

    Both roundings of the weights count. The file's own is as large as that of rows in the same format, and independent
    of the rest. Official int8 blocks: 0.0132 as they are, 0.0154 as rows (0.0147 and 0.0160 at 1536 and 13824 inputs).
    """
    return math.hypot(ERRORS[file_format][file_format], ERRORS[file_format][format])


def _error_text(file_format: str, format: str, budget: float) -> str:
    whole, kept = whole_error(file_format, format), whole_error(file_format, file_format)
    added = f"adds {ERRORS[file_format][format]:.4f}, within {budget:g}"
    return f"{added}; about {whole:.4f} against the original weights, {kept:.4f} in the file's format"


def _has_kernel(format: str, capability: tuple[int, int]) -> bool:
    """Whether anything but the eager twin multiplies in this format there."""
    operation = OPERATIONS[_PRODUCTS[format]]
    facts = Facts("cuda", operation.reads or torch.bfloat16, capability=capability)
    return operation.select(facts).implementation.name != "eager"
