"""Weights that live on the host, lent to the GPU for as long as a block runs, the next block's already under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..streams import side_stream

Adjust = Callable[[nn.Module, str, Tensor], Tensor]
Copies = list[tuple[nn.Module, str, Tensor]]
Memory = Callable[[int, int, torch.device], Tensor]
_ALIGNED = 256  # bytes; where each weight of a unit's copy begins


class Lender:
    """Forward hooks on the units of a network.

    Before a unit runs, its weights that lie elsewhere than its input are copied there; after it, however it ended, the
    ones on the host are back in their place. They are never copied back. On a GPU the copies of the next unit that
    needs any run beside the present work, so that about two units are there at a time. Units that stay keep their
    copies from their first turn on, until `release`.

    Args:
        units: the whole network, then its blocks in the order they run. A unit's weights are the parameters and buffers
            beneath it that are in no other unit.
        adjust: (module, weight's name, weight on the device) -> what is used in its place, for adapters.
        adjusts: whether `adjust` has anything to do for a module, whose weights are then lent wherever they lie.
        before: called before each unit; an exception it raises ends the pass. For its sake the host waits for the unit
            before the last one on a GPU: what it ends has little more than a unit queued.
        stays: units, by their place in the list, whose copies are kept.
        always: weights are lent even where they lie beside the input, as on a CPU all do.
        memory: (unit, bytes, device) -> uint8 [bytes] for its copy; taken from PyTorch, and given back, by default.
            What it gives one unit, it may give another two turns later.
        traced: torch.compile may see the network; keeping the hooks from it imports all of it, some seconds.
    """

    def __init__(
        self,
        units: Sequence[nn.Module],
        adjust: Adjust | None = None,
        adjusts: Callable[[nn.Module], bool] | None = None,
        before: Callable[[], None] | None = None,
        stays: frozenset[int] = frozenset(),
        always: bool = False,
        memory: Memory | None = None,
        traced: bool = True,
    ) -> None:
        self._units = [ref(unit) for unit in units]  # a cycle would keep a network until Python looks for cycles
        self._known = {id(unit) for unit in units}
        self._adjust, self._adjusts, self._before = adjust, adjusts or (lambda _: False), before
        self.stays, self.memory = stays, memory or _fresh
        self._always = always
        self._ready: dict[int, Copies] = {}  # copies that are there or under way, by unit
        self._owned: dict[int, Copies] = {}  # what the copies stand for, by unit that runs or stays
        self._settled: set[int] = set()  # units that stay, once they have been lent
        self._stream: Any = None
        self._on_gpu: torch.device | None = None
        self._done: Any = None  # the event at the end of the last unit that was queued
        for i, unit in enumerate(units):
            enter, leave = self._enter_hook(i), self._leave_hook(i)
            if traced:
                enter, leave = torch.compiler.disable(enter), torch.compiler.disable(leave)
            unit.register_forward_pre_hook(enter, with_kwargs=True)
            unit.register_forward_hook(leave, always_call=True)

    def settle(self, i: int, device: torch.device) -> None:
        """Copy a unit that stays before its first turn."""
        if i not in self._settled:
            self._use(i, self._copies(i, device), device)
            self._settled.add(i)

    def release(self) -> None:
        """Everything is back in its place; the copies are given up."""
        self._drop_ready()
        self._settled.clear()
        for unit in list(self._owned):
            self._give_back(unit)

    def weights_of(self, i: int) -> Copies:
        """A unit's own weights, those that modules share as often as they do."""
        unit = self._units[i]()
        assert unit is not None
        return [(leaf, name, weight) for leaf in self._leaves_of(unit) for name, weight in held(leaf).items()]

    def _leaves_of(self, unit: nn.Module) -> Iterator[nn.Module]:
        """The modules beneath a unit, itself included, that hold weights themselves."""
        for module in unit.children():
            if id(module) not in self._known:
                yield from self._leaves_of(module)
        if unit._parameters or unit._buffers:
            yield unit

    def _enter_hook(self, i: int) -> Any:
        def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._before is not None:
                self._before()
            if i == 0:  # a pass that Python itself broke off left them
                self._drop_ready()
                for unit in list(self._owned):
                    if unit not in self._settled:
                        self._give_back(unit)
                self._done = None
            device = next(x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            self._on_gpu = device if device.type == "cuda" else None
            self._lend(i, device)

        return enter

    def _leave_hook(self, i: int) -> Any:
        def leave(_: nn.Module, __: tuple, result: Any) -> None:
            if i in self.stays:
                self._settled.add(i)
            else:
                self._give_back(i)
            if i == 0:  # the pass is over, or broken off
                self._drop_ready()
                self._done = None
            elif self._before is not None and self._on_gpu and result is not None:
                earlier, self._done = self._done, torch.cuda.current_stream(self._on_gpu).record_event()
                if earlier is not None:
                    earlier.synchronize()

        return leave

    def _give_back(self, i: int) -> None:
        for module, name, weight in self._owned.pop(i, []):
            put(module, name, weight)

    def _drop_ready(self) -> None:
        if self._ready and self._stream is not None:  # their memory may be given to others from now on
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._ready.clear()

    def _lend(self, i: int, device: torch.device) -> None:
        if i not in self._settled:
            copies = self._ready.pop(i, None)
            if copies is None:
                copies = self._copies(i, device)
            elif self._stream is not None:
                torch.cuda.current_stream(device).wait_stream(self._stream)
            self._use(i, copies, device)
        if not self._ready:
            coming = next((j for j in range(i + 1, len(self._units)) if j not in self._settled), None)
            if coming is not None and (device.type == "cuda" or self._always):
                self._ready[coming] = self._copies(coming, device, beside=True)

    def _use(self, i: int, copies: Copies, device: torch.device) -> None:
        owned: Copies = []
        for module, name, copy in copies:
            owned.append((module, name, held(module)[name]))
            put(module, name, copy if self._adjust is None else self._adjust(module, name, copy))
        self._owned[i] = owned

    def _copies(self, i: int, device: torch.device, beside: bool = False) -> Copies:
        """A unit's weights on the device.

        Memory is taken in the order of the present stream's work and given back in it, so that it goes round however
        far the host is ahead of the GPU. The copies begin when all work up to here is done: another unit's
        weights may have been in that memory.

        Args:
            beside: on a stream of their own; whoever uses them waits for it.
        """
        wanted = [
            (module, name, weight)
            for module, name, weight in self.weights_of(i)
            if self._always or weight.device != device or self._adjusts(module)
        ]
        sources = list({id(weight): weight for _, _, weight in wanted}.values())  # shared ones are copied once
        if not sources:
            return []
        memory = self.memory(i, together_bytes(sources), device)
        targets = dict(zip(map(id, sources), laid_out(memory, sources), strict=True))
        if beside and device.type == "cuda":
            self._stream = side_stream(device, "weights")
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                _copy(sources, targets)
        else:
            _copy(sources, targets)
        return [(module, name, targets[id(weight)]) for module, name, weight in wanted]


def _copy(sources: Sequence[Tensor], targets: dict[int, Tensor]) -> None:
    for source in sources:
        targets[id(source)].copy_(source.detach(), non_blocking=True)


def held(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module itself."""
    return {k: v for k, v in (*module._parameters.items(), *module._buffers.items()) if v is not None}


def put(module: nn.Module, name: str, weight: Tensor) -> None:
    """In the place of the weight that a module has."""
    if name in module._buffers:
        module._buffers[name] = weight
    elif isinstance(weight, nn.Parameter):
        module._parameters[name] = weight
    else:
        module._parameters[name] = nn.Parameter(weight, requires_grad=False)


def _fresh(_: int, size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def together_bytes(like: Sequence[Tensor]) -> int:
    """What `laid_out` needs."""
    return sum(-(-weight.nbytes // _ALIGNED) * _ALIGNED for weight in like)


def laid_out(memory: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of these shapes and dtypes, one after the other in a piece of memory, uint8 [n]."""
    tensors, start = [], 0
    for weight in like:
        tensors.append(memory[start : start + weight.nbytes].view(weight.dtype).view(weight.shape))
        start += together_bytes([weight])
    return tensors


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
