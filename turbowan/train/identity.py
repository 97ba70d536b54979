"""What a run is, as JSON beside its states: only the same run goes on in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.files import replacing
from ..errors import CheckpointError
from . import checkpoint
from .distributed import rank

RUN_FILE = "run.json"


def claim(folder: Path, facts: Mapping[str, Any]) -> None:
    """Keep what a folder's run is; where it has states already, see that this run is the same.

    Called by all processes. What only one of the two sides knows, as of another version, does not count.

    Args:
        facts: JSON values by name; those of a mapping inside are compared one by one.

    Raises:
        CheckpointError: the folder's run is another one, or what is kept of it cannot be read or written.
    """
    path = folder / RUN_FILE
    now = _flat(json.loads(json.dumps(facts, default=str)))
    if checkpoint.saved(folder) and path.exists():
        try:
            kept = _flat(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); remove it to go on unchecked") from error
        differ = [f"{name} is {kept[name]}, now {now[name]}" for name in now if kept.get(name, now[name]) != now[name]]
        if differ:
            raise CheckpointError(
                f"{folder} holds another run ({'; '.join(differ)}); go on with its settings, or give another folder"
            )
    elif rank() == 0:
        with replacing(path) as partial:
            partial.write_text(json.dumps(facts, default=str, indent=1), encoding="utf-8")


def _flat(facts: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return found
