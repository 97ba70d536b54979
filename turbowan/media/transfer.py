"""Frames from the device that makes them to host memory, while it goes on making more."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..streams import side_stream

# Chunks on their way, at most: more than twice as many as a decoder makes in one go, so that waiting for the oldest
# never keeps the device idle. Of 4 frames of 1280x720: 133 MB of pinned memory, which PyTorch keeps and uses again.
IN_FLIGHT = 12


def to_host(chunks: Iterable[Tensor], out: Tensor) -> Iterator[tuple[int, int]]:
    """Copy a video's chunks to host memory as they come.

    On CUDA the device does not wait for the copies, nor the host for the device, except at the end.

    Args:
        chunks: uint8 [B, 3, t, H, W], in order, all on one device.
        out: uint8 [B, T, H, W, 3] on the CPU, where the frames go.

    Yields:
        start and stop of the frames that `out` now holds for good: once for each chunk, in order.
    """
    way = _Way()
    stop = 0
    for chunk in chunks:
        start, stop = stop, stop + chunk.shape[2]
        frames = chunk.permute(0, 2, 3, 4, 1)
        if frames.is_cuda:
            way.send(frames, start, stop)
            yield from way.arrived(out, IN_FLIGHT)
        else:
            out[:, start:stop] = frames
            yield start, stop
    yield from way.arrived(out, 0)


class _Way:
    """From CUDA to the host on a stream of its own."""

    def __init__(self) -> None:
        self._sent: deque[tuple[torch.cuda.Event, Tensor, Tensor, int, int]] = deque()

    def send(self, frames: Tensor, start: int, stop: int) -> None:
        frames = frames.contiguous()  # kept until it has arrived: its memory must not be used again before
        pinned = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
        stream = side_stream(frames.device, "frames")
        stream.wait_stream(torch.cuda.current_stream(frames.device))
        arrival = torch.cuda.Event(blocking=True)  # the host sleeps until then: its cores are encoding
        with torch.cuda.stream(stream):
            pinned.copy_(frames, non_blocking=True)
            arrival.record()
        self._sent.append((arrival, frames, pinned, start, stop))

    def arrived(self, out: Tensor, most: int) -> Iterator[tuple[int, int]]:
        """Put what has arrived into `out`, and wait until at most so many are on their way."""
        while self._sent and (len(self._sent) > most or self._sent[0][0].query()):
            arrival, _, pinned, start, stop = self._sent.popleft()
            arrival.synchronize()
            out[:, start:stop] = pinned
            yield start, stop
