"""Which of our nodes are registered: a key that another pack has already stays its owner's."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

log = logging.getLogger(__name__)

Entry = TypeVar("Entry")
ALIASES = "TURBOWAN_ALIASES"  # 0 in the environment: no short names


def free(entries: Mapping[str, Entry], aliases: Collection[str] = ()) -> dict[str, Entry]:
    """The entries whose keys nobody has. Those that another pack has are named in one line of the log; of a pack that
    ComfyUI imports after this one nothing is known, and it takes them over.

    Args:
        aliases: keys that an environment variable may switch off.
    """
    off = os.environ.get(ALIASES, "1").strip().lower() in ("0", "false", "no", "off")
    wanted = {key: entry for key, entry in entries.items() if not (off and key in aliases)}
    taken = {key: owner for key, owner in _owners().items() if key in wanted}
    if taken:
        owners = ", ".join(sorted(set(taken.values())))
        log.warning(
            "turbowan: %s had %s already and keeps %s; the nodes of one pack may not fit those of another"
            " (remove the pack you do not use, or one of two copies of this one)",
            owners, ", ".join(taken), "it" if len(taken) == 1 else "them",
        )  # fmt: skip
    return {key: entry for key, entry in wanted.items() if key not in taken}


def _owners() -> dict[str, str]:
    """Registered key -> the package that it came from."""
    comfyui = sys.modules.get("nodes")  # None outside ComfyUI
    return {key: _package(node) for key, node in getattr(comfyui, "NODE_CLASS_MAPPINGS", {}).items()}


def _package(node: Any) -> str:
    return str(getattr(node, "RELATIVE_PYTHON_MODULE", getattr(node, "__module__", "another pack")))
