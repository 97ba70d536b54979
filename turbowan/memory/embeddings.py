"""Embeddings of prompts that were read before, on the host."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor

LIMIT = 64  # prompts; of umT5-xxl in bfloat16 half a megabyte each for 60 tokens, at most 4 MB


class Embeddings:
    """The last prompts' embeddings, by whatever tells two apart: the prompt, the encoder's file, the dtype."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._texts: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable) -> Tensor | None:
        """[L, D] on the CPU, or None."""
        if key in self._texts:
            self._texts.move_to_end(key)
        return self._texts.get(key)

    def put(self, key: Hashable, text: Tensor) -> None:
        """Keep a copy of [L, D] in place of the one that was asked for least lately."""
        self._texts[key] = text.detach().to("cpu", copy=True)
        self._texts.move_to_end(key)
        while len(self._texts) > self._limit:
            self._texts.popitem(last=False)
