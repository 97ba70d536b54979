"""How a node declares its inputs: one line each, in ComfyUI's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Input = tuple[Any, dict[str, Any]]
MAX_SEED = 2**64 - 1


def link(kind: str, tooltip: str) -> Input:
    """An input that only another node can give: MODEL, VAE, CONDITIONING …"""
    return kind, {"tooltip": tooltip}


def combo(options: Sequence[Any], tooltip: str, default: Any = None) -> Input:
    """One of a list; the first where no default is named."""
    named = {} if default is None else {"default": default}
    return list(options), {**named, "tooltip": tooltip}


def whole(default: int, low: int, high: int, tooltip: str, step: int = 1) -> Input:
    return "INT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip}


def number(default: float, low: float, high: float, step: float, tooltip: str) -> Input:
    return "FLOAT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip}


def switch(default: bool, tooltip: str) -> Input:
    return "BOOLEAN", {"default": default, "tooltip": tooltip}


def text(default: str, tooltip: str, multiline: bool = False) -> Input:
    return "STRING", {"default": default, "multiline": multiline, "tooltip": tooltip}


def seed() -> Input:
    tooltip = "Seed of the noise; the same seed gives the same video."
    return "INT", {"default": 0, "min": 0, "max": MAX_SEED, "tooltip": tooltip}
