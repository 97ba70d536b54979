"""Whether all parts of a model may stay loaded, from their sizes and what is free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import MachineError
from ..machine import free_memory
from ..request import parse_bytes

HEADROOM = 0.6  # of free memory may hold weights; the rest is for activations


@dataclass(frozen=True)
class Plan:
    """keep: parts stay loaded between stages and requests. total and available: bytes."""

    keep: bool
    total: int
    available: int
    reason: str


def file_bytes(path: Path) -> int:
    """Size of a weight file, of the shards that an index names, or of all files in a folder."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    if path.suffix == ".json":
        shards = set(json.loads(path.read_text())["weight_map"].values())
        return sum(file_bytes(path.parent / name) for name in shards)
    return path.stat().st_size


def available_bytes(device: torch.device) -> int:
    """Free memory of the GPU, or of the host for a CPU engine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory() or 0


def make_plan(mode: str, sizes: Mapping[str, int], device: torch.device, budget: int | str | None = None) -> Plan:
    """Decide what stays loaded.

    Args:
        mode: "speed" keeps everything, "minimal" frees each part after its stage; "auto" and "balanced" keep what fits.
        sizes: bytes of weights per part.
        budget: at most so many bytes of GPU memory.

    Raises:
        MachineError: the largest part alone is over the budget.
    """
    total, available = sum(sizes.values()), available_bytes(device)
    if budget is not None:
        available = min(available, parse_bytes(budget))
        name, largest = max(sizes.items(), key=lambda item: item[1])
        if largest > available:
            raise MachineError(
                f"{name} alone has {largest / 1e9:.1f} GB of weights, over the budget of {available / 1e9:.1f} GB;"
                " raise --gpu-budget or take a quantised file"
            )
    fits = total <= HEADROOM * available
    keep = mode == "speed" or (mode != "minimal" and fits)
    relation = "within" if fits else "over"
    reason = f"{mode}: {total / 1e9:.1f} GB of weights, {relation} {HEADROOM:.0%} of {available / 1e9:.1f} GB available"
    return Plan(keep, total, available, reason)
