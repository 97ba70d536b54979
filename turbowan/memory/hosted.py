"""A part whose weights live on the host: the device has them, whole or block by block, only while it is in use."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import Note
from .lending import Copies, Lender, held, put, together_bytes
from .locked import Locked
from .plan import Place
from .sizes import blocks_of

Change = Callable[[nn.Module], None]


class Hosted:
    """A module on the host and what lends it to a device.

    Args:
        module: on the host. place: of the plan.
        change: called with each block, on the device, before it goes back to the host; None: they stay as they are.
        check: called between blocks; an exception it raises ends the preparation.
    """

    def __init__(
        self,
        module: nn.Module,
        place: Place,
        device: torch.device,
        change: Change | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.module, self.place, self._device = module, place, device
        self._seats: Seats | None = None
        self._locked: list[Locked] = []
        blocks = blocks_of(module)
        self._lender = Lender([module, *blocks], always=device.type != "cuda", traced=False)
        pins = place.pinned and device.type == "cuda"
        for i, unit in enumerate([module, *blocks]):
            check()
            if i and change is not None:
                move(unit, device)
                change(unit)
            pins = pins and self._lock(i)
            if i and not pins:
                move(unit, torch.device("cpu"))

    def _lock(self, i: int) -> bool:
        """Put a unit's weights, wherever they are, into locked memory. False, and a note, where there is none."""
        weights = self._lender.weights_of(i)
        own = distinct(weights)
        if not own:
            return True
        try:
            locked = Locked(own, self._device)
        except RuntimeError as error:
            note = f"host memory cannot be locked ({error}); weights are copied to the GPU more slowly"
            warnings.warn(note, Note, stacklevel=2)
            return False
        self._locked.append(locked)
        at = dict(zip(map(id, own), locked.tensors, strict=True))
        for module, name, weight in weights:
            put(module, name, at[id(weight)])
        return True

    def enter(self) -> nn.Module:
        """Memory is taken on the device, and what is in no block goes there; blocks follow when they are run."""
        if self._seats is None:
            count, resident = self.place.blocks, self.place.resident
            spread = {b + 1 for b in range(count) if (b + 1) * resident // count > b * resident // count}
            self._lender.stays = frozenset({0, *spread})
            sizes = [together_bytes(distinct(self._lender.weights_of(i))) for i in range(1 + count)]
            self._seats = self._lender.memory = Seats(sizes, self._lender.stays, self._device)
            self._lender.settle(0, self._device)
        return self.module

    def leave(self) -> None:
        """Nothing is left on the device."""
        self._lender.release()
        self._seats = None
        self._lender.memory = _none

    def follow(self, place: Place) -> None:
        """Another plan's."""
        if place != self.place:
            self.leave()
            self.place = place

    @property
    def device_bytes(self) -> int:
        """Taken on the device now."""
        return 0 if self._seats is None else self._seats.nbytes

    @property
    def host_bytes(self) -> int:
        """Of weights on the host."""
        lent = self.device_bytes and self._device.type != "cuda"
        return 0 if lent else self.place.nbytes


class Seats:
    """One piece of a device's memory: a seat for each unit that stays, and two that the others take in turns.

    Args:
        sizes: bytes of each unit. stays: those with a seat of their own.
    """

    def __init__(self, sizes: list[int], stays: frozenset[int], device: torch.device) -> None:
        starts, end = {}, 0
        for i in sorted(stays):
            starts[i] = end
            end += sizes[i]
        lent = [size for i, size in enumerate(sizes) if i not in stays]
        turn = max(lent, default=0)
        self._starts, self._turns, self._count = starts, [end + turn * i for i in range(min(2, len(lent)))], 0
        self._memory = torch.empty(end + turn * len(self._turns), dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def __call__(self, unit: int, size: int, device: torch.device) -> Tensor:
        start = self._starts.get(unit)
        if start is None:
            start = self._turns[self._count % len(self._turns)]
            self._count += 1
        return self._memory[start : start + size]


def _none(unit: int, size: int, device: torch.device) -> Tensor:
    raise RuntimeError(f"block {unit - 1} is run after its part was given up")


def distinct(weights: Copies) -> list[Tensor]:
    """Each once, in order."""
    return list({id(weight): weight for _, _, weight in weights}.values())


def move(module: nn.Module, device: torch.device) -> None:
    """As `module.to`, which fails where weights were made outside of inference mode and are moved within it."""
    for below in module.modules():
        for name, weight in held(below).items():
            if weight.device != device:
                put(below, name, weight.detach().to(device))
