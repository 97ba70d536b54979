"""Keys of ours that other packs have, too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")
SWITCH = "TURBOWAN_ALIASES"  # 0 turns them off


def aliases(entries: Mapping[str, Entry], always: bool = False) -> dict[str, Entry]:
    """Those of the entries that may be registered: a key that ComfyUI has already stays its owner's.

    Args:
        always: no public pack has these keys; only the switch in the environment keeps them away.
    """
    if os.environ.get(SWITCH, "1").strip().lower() in ("0", "false", "no", "off"):
        return {}
    taken = set() if always else _registered()
    return {key: entry for key, entry in entries.items() if key not in taken}


def _registered() -> set[str]:
    try:
        from nodes import NODE_CLASS_MAPPINGS
    except Exception:  # outside ComfyUI
        return set()
    return set(NODE_CLASS_MAPPINGS)
