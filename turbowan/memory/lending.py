"""Weights that live on the host, lent to the GPU for as long as a block runs, the next block's already under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

Adjust = Callable[[nn.Module, str, Tensor], Tensor]
Copies = list[tuple[nn.Module, str, Tensor]]


class Lender:
    """Forward hooks on the units of a network.

    Before a unit runs, its weights that lie elsewhere than its input are copied there; after it, however it ended, the
    ones on the host are back in their place. They are never copied back. On a GPU the copies of the block that comes
    next run beside the present one's work. The host waits for the block before the present one first: two are there
    at a time, and work that `before` ends has little more than a block queued.

    Args:
        units: the whole network, then its blocks in the order they run. A unit's weights are the parameters beneath it
            that are in no other unit.
        adjust: (module, parameter's name, weight on the device) -> what is used in its place, for adapters.
        adjusts: whether `adjust` has anything to do for a module, whose weights are then lent wherever they lie.
        before: called before each unit; an exception it raises ends the pass.
    """

    def __init__(
        self,
        units: Sequence[nn.Module],
        adjust: Adjust | None = None,
        adjusts: Callable[[nn.Module], bool] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self._units = [ref(unit) for unit in units]  # a cycle would keep a network until Python looks for cycles
        self._known = {id(unit) for unit in units}
        self._adjust, self._adjusts, self._before = adjust, adjusts or (lambda _: False), before
        self._ready: dict[int, Copies] = {}  # copies that are there or under way, by unit
        self._owned: dict[int, Copies] = {}  # what the copies stand for, by unit that runs
        self._stream: Any = None
        self._done: Any = None  # the event at the end of the last block that was queued
        for i, unit in enumerate(units):
            unit.register_forward_pre_hook(self._enter_hook(i), with_kwargs=True)
            unit.register_forward_hook(self._leave_hook(i), always_call=True)

    def _leaves_of(self, unit: nn.Module) -> Iterator[nn.Module]:
        """The modules beneath a unit, itself included, that hold weights themselves."""
        for module in unit.children():
            if id(module) not in self._known:
                yield from self._leaves_of(module)
        if unit._parameters:
            yield unit

    def _enter_hook(self, i: int) -> Any:
        @torch.compiler.disable
        def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._before is not None:
                self._before()
            if i == 0:  # a pass that Python itself broke off left them
                for unit in list(self._owned):
                    self._give_back(unit)
                self._done = None
            device = next(x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            self._lend(i, device)

        return enter

    def _leave_hook(self, i: int) -> Any:
        @torch.compiler.disable
        def leave(_: nn.Module, __: tuple, result: Any) -> None:
            self._give_back(i)
            if i == 0:  # the pass is over, or broken off
                self._ready.clear()
                self._done = None
            elif result is not None and self._stream is not None:
                before, self._done = self._done, torch.cuda.current_stream(self._stream.device).record_event()
                if before is not None:
                    before.synchronize()
                self._prepare(i + 1)

        return leave

    def _give_back(self, i: int) -> None:
        for module, name, weight in self._owned.pop(i, []):
            module._parameters[name] = weight  # type: ignore[assignment]

    def _lend(self, i: int, device: torch.device) -> None:
        copies = self._ready.pop(i, None) or self._copies(i, device)
        if device.type == "cuda" and self._stream is not None:
            torch.cuda.current_stream(device).wait_stream(self._stream)
        owned: Copies = []
        for module, name, copy in copies:
            weight = module._parameters[name]
            assert weight is not None
            owned.append((module, name, weight))
            if copy.is_cuda:
                copy.record_stream(torch.cuda.current_stream(device))
            used = copy if self._adjust is None else self._adjust(module, name, copy)
            module._parameters[name] = nn.Parameter(used, requires_grad=False)
        self._owned[i] = owned
        if i == 0:
            if device.type != "cuda":
                self._stream = None
            else:
                if self._stream is None or self._stream.device != device:
                    self._stream = torch.cuda.Stream(device)
                self._stream.wait_stream(torch.cuda.current_stream(device))  # for weights that are just being loaded
            self._prepare(1)

    def _prepare(self, i: int) -> None:
        """Start a unit's copies beside what runs, on a GPU."""
        if self._stream is not None and i < len(self._units):
            with torch.cuda.stream(self._stream):
                self._ready[i] = self._copies(i, self._stream.device)

    def _copies(self, i: int, device: torch.device) -> Copies:
        copies: Copies = []
        unit = self._units[i]()
        assert unit is not None
        made: dict[Tensor, Tensor] = {}  # weights that two modules share are copied once
        for module in self._leaves_of(unit):
            adjusted = self._adjusts(module)
            for name, weight in module._parameters.items():
                if weight is not None and (adjusted or weight.device != device):
                    if adjusted or weight not in made:
                        made[weight] = weight.detach().to(device, non_blocking=True, copy=adjusted)
                    copies.append((module, name, made[weight]))
        return copies


CHUNK = 2**28  # bytes of page-locked memory at a time; PyTorch rounds each request up to a power of two
ALIGNMENT = 256


def pin(module: nn.Module) -> bool:
    """Put a module's host weights into page-locked memory, from which a GPU copies while it computes.

    Returns:
        False where the machine does not lock so much: the weights left are as they were, only slower to copy.
    """
    found = [
        (leaf, name, weight)
        for leaf in module.modules()
        for name, weight in leaf._parameters.items()
        if weight is not None and weight.device.type == "cpu" and not weight.is_pinned()
    ]
    try:
        for chunk in packed([weight.nbytes for _, _, weight in found]):
            memory = torch.empty(max(end for _, _, end in chunk), dtype=torch.uint8, pin_memory=True)
            for i, start, end in chunk:
                leaf, name, weight = found[i]
                locked = memory[start:end].view(weight.dtype).view(weight.shape)
                leaf._parameters[name] = nn.Parameter(locked.copy_(weight.detach()), requires_grad=False)
    except RuntimeError:
        return False
    return True


def packed(sizes: Sequence[int], chunk: int = CHUNK) -> list[list[tuple[int, int, int]]]:
    """Which of some tensors share which piece of memory, as (index, first byte, end); only lone ones pass `chunk`."""
    chunks: list[list[tuple[int, int, int]]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for each in chunks:
            start = -(-each[-1][2] // ALIGNMENT) * ALIGNMENT
            if start + sizes[i] <= chunk:
                each.append((i, start, start + sizes[i]))
                break
        else:
            chunks.append([(i, 0, sizes[i])])
    return chunks
