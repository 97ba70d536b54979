"""From files straight onto a GPU: read in parallel into a small page-locked pool, copied and converted meanwhile.

On the host there is never more of a file than the pool and what the system caches of it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..streams import side_stream
from .mapped import FileMaps, Place

# guesses: large enough that starting a read costs nothing, small enough that copies begin at once
CHUNK = 16 << 20  # bytes of one read
SLOTS = 16  # chunks in page-locked memory at a time: 256 MiB
READERS = 8  # threads
_GAP = 4096  # bytes between two tensors of a file that are read along rather than skipped


class Item(NamedTuple):
    """A tensor on the CPU, mapped from a file or not, and the dtype it gets."""

    source: Tensor
    dtype: torch.dtype


@dataclass
class _Piece:
    """Bytes of one tensor within a chunk: from `start` on in the tensor, at `at` in the chunk."""

    key: str
    start: int
    size: int
    at: int


@dataclass
class _Chunk:
    """Bytes that are read at once, of a file or (without a place) of a tensor in memory."""

    place: Place | None
    memory: Tensor | None = None
    size: int = 0
    pieces: list[_Piece] = field(default_factory=list)


@dataclass
class _Slot:
    """Room for a chunk. copied: an event, past which it may be overwritten."""

    memory: Tensor
    copied: Any = None


def transfer(
    groups: Sequence[Mapping[str, Item]], device: torch.device, report: Callable[[int], None] = lambda size: None
) -> Iterator[dict[str, Tensor]]:
    """Put tensors on a device, group by group, each in its dtype.

    Args:
        groups: tensors by name. Those of one group become memory of the device at once, so whoever moves a group on
            before taking the next needs room for no more than one.
        device: a GPU; a CPU goes the same way, without what only a GPU has.
        report: called with the bytes of each read.

    Yields:
        Each group's tensors, ready for work on the device's current stream.

    Raises:
        CheckpointError: a file is shorter than it was, or cannot be read.
    """
    maps = FileMaps()
    plan = [(i, chunk) for i, group in enumerate(groups) for chunk in _chunks(group, maps)]
    last = {i: n for n, (i, _) in enumerate(plan)}
    files = _Files()
    free = deque(_slot(device) for _ in range(min(SLOTS, len(plan))))
    under_way: deque[tuple[_Slot, Future[None]]] = deque()
    todo = iter(plan)
    pool = ThreadPoolExecutor(READERS, "turbowan-read")
    try:
        n = 0
        for i, group in enumerate(groups):
            with _on(device):
                placed = {
                    key: torch.empty(item.source.shape, dtype=item.dtype, device=device) for key, item in group.items()
                }
                beside = _Beside(device)
                while n <= last.get(i, -1):
                    while free and (following := next(todo, None)) is not None:
                        slot = free.popleft()
                        under_way.append((slot, pool.submit(_read, following[1], slot, files)))
                    slot, read = under_way.popleft()
                    read.result()
                    chunk = plan[n][1]
                    slot.copied = beside.copy(chunk, slot.memory, group, placed)
                    free.append(slot)
                    report(sum(piece.size for piece in chunk.pieces))
                    n += 1
                beside.join()
            yield placed
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        files.close()
        if device.type == "cuda":  # of a load that broke off: nothing may be copied into memory that is given back
            side_stream(device, "load").synchronize()


def _chunks(group: Mapping[str, Item], maps: FileMaps) -> Iterator[_Chunk]:
    """A group's bytes in the order of its files, neighbours together, none longer than CHUNK."""
    found = [(maps.locate(item.source), key, item.source) for key, item in group.items()]
    for _, key, source in (entry for entry in found if entry[0] is None):
        flat = source.flatten().view(torch.uint8)
        for start in range(0, source.nbytes, CHUNK):
            size = min(CHUNK, source.nbytes - start)
            yield _Chunk(None, flat[start : start + size], size, [_Piece(key, start, size, 0)])
    chunk: _Chunk | None = None
    mapped = sorted((place, key, source.nbytes) for place, key, source in found if place is not None)
    for place, key, length in mapped:
        for start in range(0, length, CHUNK):
            size, offset = min(CHUNK, length - start), place.offset + start
            at = offset - chunk.place.offset if chunk is not None and chunk.place is not None else -1
            near = chunk is not None and chunk.place is not None and chunk.place.path == place.path
            if chunk is not None and near and chunk.size <= at <= chunk.size + _GAP and at + size <= CHUNK:
                chunk.size = at + size
            else:
                if chunk is not None:
                    yield chunk
                chunk, at = _Chunk(Place(place.path, offset), size=size), 0
            chunk.pieces.append(_Piece(key, start, size, at))
    if chunk is not None:
        yield chunk


def _read(chunk: _Chunk, slot: _Slot, files: _Files) -> None:
    """In a thread of its own: wait until the slot may be overwritten, then fill it."""
    if slot.copied is not None:
        slot.copied.synchronize()
    room = slot.memory[: chunk.size].numpy()  # NumPy's: another thread's inference mode does not reach here
    if chunk.memory is not None:
        room[:] = chunk.memory.numpy()
        return
    assert chunk.place is not None
    files.read(chunk.place, room.data)


class _Files:
    """Open files by path, read at offsets by any thread."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def read(self, place: Place, room: memoryview) -> None:
        try:
            number = self._numbers.get(place.path)
            if number is None:
                number = os.open(place.path, os.O_RDONLY)
                if self._numbers.setdefault(place.path, number) != number:  # another thread was as quick
                    os.close(number)
                    number = self._numbers[place.path]
            done = 0
            while done < len(room):
                got = os.preadv(number, [room[done:]], place.offset + done)
                if got == 0:
                    size, end = os.fstat(number).st_size, place.offset + len(room)
                    raise CheckpointError(
                        f"{place.path} is cut short: {size:,} bytes, {end:,} are wanted; download it again"
                    )
                done += got
        except OSError as error:
            raise CheckpointError(f"{place.path} cannot be read: {error.strerror or error}") from error

    def close(self) -> None:
        for number in self._numbers.values():
            os.close(number)


# ---- what only a GPU has: page-locked memory, a stream of copies beside the current one, events ----


def _slot(device: torch.device) -> _Slot:
    """Page-locked where the system gives so much; PyTorch keeps what is freed for the next pool."""
    if device.type == "cuda":
        with suppress(RuntimeError):
            return _Slot(torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True))
    return _Slot(torch.empty(CHUNK, dtype=torch.uint8))


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Beside:
    """Copies to a device on a stream of their own, which starts when all work of the current one is done that used the
    memory copied to before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = side_stream(device, "load") if device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def copy(self, chunk: _Chunk, memory: Tensor, group: Mapping[str, Item], placed: Mapping[str, Tensor]) -> Any:
        """A chunk's pieces into their tensors; an event that says when `memory` is free again."""
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            for piece in chunk.pieces:
                source, target = group[piece.key].source, placed[piece.key].flatten()
                data = memory[piece.at : piece.at + piece.size]
                if target.dtype == source.dtype:
                    part = target.view(torch.uint8)[piece.start : piece.start + piece.size]
                    part.copy_(data, non_blocking=True)
                else:
                    first, width = piece.start // source.itemsize, piece.size // source.itemsize
                    there = data.to(self.device, non_blocking=True, copy=True).view(source.dtype)
                    target[first : first + width].copy_(there)
        return None if self.stream is None else self.stream.record_event()

    def join(self) -> None:
        """What follows on the current stream finds the copies done."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
