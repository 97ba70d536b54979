"""What is loaded. All state of an engine is here: parts by name, loaded when first asked for, placed by the plan."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from threading import Event, Thread
from typing import Any

import torch
from torch import nn

from ..errors import Note
from ..machine import size_text
from .embeddings import Embeddings
from .hosted import Change, Hosted
from .plan import Place

Ready = Callable[[Any], Change | None]  # of a part that was just read: what its blocks need
STAYS = Place("gpu", 0)  # of a part that no plan speaks of
SLACK = 1 << 29  # bytes that may be taken besides weights before decoding: latents, what libraries keep


class Residency:
    """Parts by role, each loaded at most once until released.

    Args:
        device: of the engine.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.texts = Embeddings()
        self._places: Mapping[str, Place] = {}
        self._parts: dict[str, tuple[Hashable, Any]] = {}
        self._coming: dict[str, tuple[Hashable, Coming]] = {}
        self._told = False  # that something was not freed

    def place(self, role: str) -> Place:
        """Where the plan has a part."""
        return self._places.get(role, STAYS)

    def loads_to(self, role: str) -> torch.device:
        """Where a part's weights are to be read to: the device, or the host if it is lent to the device."""
        return torch.device("cpu") if self.is_hosted(role) else self.device

    def is_hosted(self, role: str) -> bool:
        """Whether a part's weights live on the host and are lent to the device."""
        return self.place(role).hosted

    def has(self, role: str, variant: Hashable) -> bool:
        """Whether a part is loaded in this variant."""
        return role in self._parts and self._parts[role][0] == variant

    def follow(self, places: Mapping[str, Place]) -> None:
        """Go over to a plan: what is elsewhere in it is released, to be loaded when it is next wanted."""
        self.cancel()
        self._places = places
        for role, (_, part) in list(self._parts.items()):
            place = self.place(role)
            if place.home == "disk" or isinstance(part, Hosted) != place.hosted:
                self.release(role)
            elif isinstance(part, Hosted):
                part.follow(place)

    def get(self, role: str, variant: Hashable, load: Callable[[], Any], ready: Ready | None = None) -> Any:
        """The part in this variant (its precision), loaded now if it is not there; another variant is freed first.

        Args:
            load: reads it to where `loads_to` says. ready: for a part on the host, see `Hosted`.

        Raises:
            whatever loading raises, also where it began in the background.
        """
        if role in self._coming:
            wanted, coming = self._coming.pop(role)
            part = coming.result()
            if wanted == variant:
                self._parts[role] = variant, part
        if role in self._parts and self._parts[role][0] != variant:
            self.release(role)
        if role not in self._parts:
            self._parts[role] = variant, self._make(role, load, ready)
        part = self._parts[role][1]
        return part.enter() if isinstance(part, Hosted) else part

    def start(self, role: str, variant: Hashable, load: Callable[[], Any], ready: Ready | None = None) -> None:
        """Begin to load a part in the background unless it is there. One after the other, in the order they started."""
        if role in self._coming or self.has(role, variant):
            return
        self.release(role)
        before = [coming for _, coming in self._coming.values()]

        def make(check: Callable[[], None]) -> Any:
            for other in before:
                other.wait()
            check()
            return self._make(role, load, ready, check)

        self._coming[role] = variant, Coming(make, self.device)

    @property
    def is_loading(self) -> bool:
        """Whether a part that was begun in the background was not asked for yet."""
        return bool(self._coming)

    def settle(self) -> None:
        """Wait for what loads in the background; its errors are raised where the part is wanted."""
        for _, coming in self._coming.values():
            coming.wait()

    def cancel(self, wait: bool = True) -> None:
        """Stop loading in the background; what was loaded so far goes.

        Args:
            wait: until it has ended; otherwise the next request does.
        """
        for _, coming in self._coming.values():
            coming.stop()
        if wait:
            for _, coming in self._coming.values():
                coming.wait()
            self._coming.clear()

    def _make(
        self, role: str, load: Callable[[], Any], ready: Ready | None, check: Callable[[], None] = lambda: None
    ) -> Any:
        part, place = load(), self.place(role)
        if not place.hosted:
            return part
        return Hosted(part, place, self.device, None if ready is None else ready(part), check)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights on the device, and of room taken for them."""
        return sum(
            part.device_bytes if isinstance(part, Hosted) else _weights(part) for _, part in self._parts.values()
        )

    @property
    def host_bytes(self) -> int:
        """Bytes of weights on the host, of an engine on a GPU."""
        return sum(part.host_bytes for _, part in self._parts.values() if isinstance(part, Hosted))

    def done(self, role: str) -> None:
        """The stage that needed this part is over; it leaves the device unless the plan keeps it there."""
        part = self._parts.get(role, (None, None))[1]
        if self.place(role).home == "disk":
            self.release(role)
        elif isinstance(part, Hosted):
            part.leave()

    def rest(self) -> None:
        """No stage needs anything, as after a request that was broken off."""
        self.cancel(wait=False)
        for role in list(self._parts):
            self.done(role)

    def tidy(self, foreign: int = 0) -> None:
        """Give the GPU what PyTorch holds unused, and see that nothing is left but what the plan keeps.

        Args:
            foreign: bytes that others in this process have there.

        Warns:
            Note: more than that is taken; once.
        """
        if self.device.type != "cuda" or all(place.home == "gpu" for place in self._places.values()):
            return
        torch.cuda.empty_cache()
        if self._coming:  # what loads in the background is not counted yet
            return
        left = torch.cuda.memory_allocated(self.device) - foreign - self.nbytes
        if left > SLACK and not self._told:
            self._told = True
            warnings.warn(f"{size_text(left)} more than planned are still taken on {self.device}", Note, stacklevel=2)

    def clear(self) -> None:
        """Free everything."""
        self.cancel()
        for role in list(self._parts):
            self.release(role)

    def release(self, role: str) -> None:
        part = self._parts.pop(role, (None, None))[1]
        if part is None:
            return
        if isinstance(part, Hosted):
            part.leave()
        del part
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class Coming:
    """Something that a thread makes.

    Args:
        make: gets a function to call now and then, which ends it when it is no longer wanted.
    """

    def __init__(self, make: Callable[[Callable[[], None]], Any], device: torch.device) -> None:
        self._stop = Event()
        self._made: Any = None
        self._error: BaseException | None = None

        def run() -> None:
            try:
                with torch.inference_mode(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                    made = make(self._check)
                self._check()
                self._made = made
            except BaseException as error:  # for whoever asks for the result
                self._error = error

        self._thread = Thread(target=run, daemon=True)
        self._thread.start()

    def _check(self) -> None:
        if self._stop.is_set():
            raise InterruptedError

    def stop(self) -> None:
        self._stop.set()
        self._made = None

    def wait(self) -> None:
        self._thread.join()

    def result(self) -> Any:
        self._thread.join()
        made, error = self._made, self._error
        self._made = self._error = None
        if error is not None:
            raise error
        return made


def _weights(part: Any) -> int:
    if not isinstance(part, nn.Module):
        return 0
    return sum({id(w): w.nbytes for w in (*part.parameters(), *part.buffers())}.values())
