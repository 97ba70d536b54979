"""What is loaded. All state of an engine is here: parts by name, loaded when first asked for, freed by the plan."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from .embeddings import Embeddings


class Residency:
    """Parts by key, each loaded at most once until released.

    Args:
        keep: whether parts stay loaded after their stage.
    """

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self.texts = Embeddings()
        self._parts: dict[str, tuple[Hashable, Any]] = {}

    def get(self, role: str, variant: Hashable, load: Callable[[], Any]) -> Any:
        """The part in this variant (its precision), loaded now if it is not there; another variant is freed first."""
        if role in self._parts and self._parts[role][0] != variant:
            self.release(role)
        if role not in self._parts:
            self._parts[role] = variant, load()
        return self._parts[role][1]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights that are loaded."""
        modules = [part for _, part in self._parts.values() if isinstance(part, nn.Module)]
        return sum(t.nbytes for module in modules for t in (*module.parameters(), *module.buffers()))

    def done(self, role: str) -> None:
        """The stage that needed this part is over; free it unless the plan keeps parts."""
        if not self.keep:
            self.release(role)

    def clear(self) -> None:
        """Free everything."""
        for role in list(self._parts):
            self.release(role)

    def release(self, role: str) -> None:
        if self._parts.pop(role, None) is not None:
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
