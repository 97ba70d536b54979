"""Where the bytes of a memory-mapped tensor lie in its file."""

from __future__ import annotations

import re
from bisect import bisect_right
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_LINE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ +(/.*)$", re.MULTILINE)
_SEEN = 512  # bytes of a tensor that are compared with the file's


class Place(NamedTuple):
    """Bytes of a file from an offset on."""

    path: str
    offset: int


class FileMaps:
    """What files this process has mapped now, as the system tells; none where it does not (elsewhere than on Linux).

    Whoever mapped them: both `safetensors` and `torch.load` do, and views of their tensors lie in the file as well.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[int, int, int, str]] = []  # first and last address, offset in the file, path
        with suppress(OSError):
            for start, end, offset, path in _LINE.findall(Path("/proc/self/maps").read_text(errors="replace")):
                self._spans.append((int(start, 16), int(end, 16), int(offset, 16), path))
        self._checked: dict[str, bool] = {}

    def locate(self, tensor: Tensor) -> Place | None:
        """The place of a contiguous tensor on the CPU; None where it lies in memory, or its file is no longer there."""
        address, size = tensor.data_ptr(), tensor.nbytes
        i = bisect_right(self._spans, address, key=lambda span: span[0]) - 1
        if i < 0 or size == 0 or address + size > self._spans[i][1]:
            return None
        start, _, offset, path = self._spans[i]
        place = Place(path, offset + address - start)
        if path not in self._checked:
            self._checked[path] = _holds(place, tensor)
        return place if self._checked[path] else None


def _holds(place: Place, tensor: Tensor) -> bool:
    """Whether the file of this name is the one that is mapped: another may have taken its place since."""
    seen = tensor.flatten().view(torch.uint8)[:_SEEN]
    try:
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            return file.read(len(seen)) == seen.numpy().tobytes()
    except OSError:
        return False
