"""Whether all parts of a model may stay loaded, from their sizes and what is free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import MachineError
from ..machine import free_memory, size_text
from ..request import parse_bytes

HEADROOM = 0.6  # of free memory may hold weights; the rest is for activations
UNKNOWN_HOST = 8 * 10**9  # bytes that a host is taken to have when it does not tell


@dataclass(frozen=True)
class Plan:
    """keep: parts stay loaded between stages and requests. total and available: bytes."""

    keep: bool
    total: int
    available: int
    reason: str


def weight_bytes(part: nn.Module, dtype: torch.dtype, whole: bool = False) -> int:
    """Bytes of a module's weights once loaded in a dtype; what is quantised stays so, or (`whole`) is expanded to it.

    A meta module serves.
    """

    def size(weight: Tensor) -> int:
        quantized = not whole and (weight.element_size() == 1 or not weight.is_floating_point())
        return weight.numel() * (weight.element_size() if quantized else dtype.itemsize)

    return sum(size(weight) for weight in (*part.parameters(), *part.buffers()))


def available_bytes(device: torch.device, resident: int = 0) -> int:
    """What weights and activations may take together: what is free on the GPU (on the host, for a CPU engine), what
    PyTorch holds there unused, and the `resident` bytes of weights already loaded.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused + resident
    return (free_memory() or UNKNOWN_HOST) + resident


def make_plan(
    mode: str, sizes: Mapping[str, int], device: torch.device, budget: int | str | None = None, resident: int = 0
) -> Plan:
    """Decide what stays loaded.

    Args:
        mode: "speed" keeps everything, "minimal" frees each part after its stage; "auto" and "balanced" keep what fits.
        sizes: bytes of weights per part.
        budget: at most so many bytes of memory, of the GPU where there is one.
        resident: bytes of these parts that are loaded already; without it a second request would find less room.

    Raises:
        MachineError: over the budget or the GPU's memory is the largest part alone, or with "speed" all parts together.
    """
    total, available, place = sum(sizes.values()), available_bytes(device, resident), f"free on {device}"
    if budget is not None and parse_bytes(budget) < available:
        available, place = parse_bytes(budget), "in the budget"
    name, largest = max(sizes.items(), key=lambda item: item[1])
    needed, what, advice = largest, f"{name} alone has", "take a quantised file"
    if mode == "speed" and largest <= available:
        needed, what, advice = total, "memory 'speed' keeps all", "take 'auto' or 'minimal'"
    if needed > available and (device.type == "cuda" or budget is not None):  # a host without a budget may swap
        advice += " or raise --gpu-budget" if place == "in the budget" else ""
        raise MachineError(
            f"{what} {size_text(needed)} of weights, more than the {size_text(available)} {place}; {advice}"
        )
    fits = total <= HEADROOM * available
    keep = mode == "speed" or (mode != "minimal" and fits)
    relation = "within" if fits else "over"
    reason = f"{mode}: {size_text(total)} of weights, {relation} {HEADROOM:.0%} of {size_text(available)} {place}"
    return Plan(keep, total, available, reason)
