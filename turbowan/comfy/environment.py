"""Defaults that a deployment sets by environment variables; a widget always stands before them.

ENABLE_TURBO: 0, false, no or off make 'original' the attention that is chosen first. ATTENTION_TYPE: that choice by
name. TURBO_STEPS: 1 to 4. Anything else is passed over: ComfyUI asks for these whenever it lists the nodes.
"""

from __future__ import annotations

import os

ATTENTION = ("sagesla", "sla", "original")


def default_steps() -> int:
    value = os.environ.get("TURBO_STEPS", "").strip()
    return int(value) if value in ("1", "2", "3", "4") else 4


def default_attention() -> str:
    value = os.environ.get("ATTENTION_TYPE", "").strip().lower()
    if value in ATTENTION:
        return value
    off = os.environ.get("ENABLE_TURBO", "").strip().lower() in ("0", "false", "no", "off")
    return "original" if off else "sla"
