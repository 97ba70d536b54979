"""Parts are loaded when first asked for, in the background where that is begun, and placed by the plan."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Mapping
from threading import Event

import pytest
import torch
from torch import nn

from turbowan.errors import Note
from turbowan.memory.plan import Place
from turbowan.memory.residency import SLACK, Residency


class Part(nn.Module):
    """A layer, a buffer, and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(100, 50)
        self.register_buffer("table", torch.zeros(10, dtype=torch.int8))
        self.blocks = nn.ModuleList(nn.Linear(50, 50) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


class Loader:
    """Loads a fresh module each time, remembers which still live."""

    def __init__(self) -> None:
        self.loaded: list[weakref.ref[nn.Module]] = []
        self.go = Event()
        self.go.set()

    def __call__(self) -> nn.Module:
        part = Part()
        self.loaded.append(weakref.ref(part))
        assert self.go.wait(20)
        return part

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.loaded)


REST, BLOCK = 4 * (100 * 50 + 50) + 10, 4 * (50 * 50 + 50)
BYTES = REST + 2 * BLOCK


def places(home: str, resident: int = 2, *roles: str) -> Mapping[str, Place]:
    return dict.fromkeys(roles or ("vae", "text"), Place(home, BYTES, 2, resident))


def test_a_kept_part_is_loaded_once() -> None:
    parts, load = Residency(), Loader()
    first = parts.get("vae", torch.float32, load)
    parts.done("vae")
    assert parts.get("vae", torch.float32, load) is first
    assert len(load.loaded) == 1
    del first
    parts.get("vae", torch.bfloat16, load)  # another precision takes its place
    assert (load.alive, len(load.loaded)) == (1, 2)
    assert parts.nbytes == BYTES


def test_a_part_that_is_not_kept_goes_after_its_stage() -> None:
    parts, load = Residency(), Loader()
    parts.follow(places("disk"))
    for _ in range(3):
        parts.get("text", None, load)
        assert parts.get("text", None, load) is parts.get("text", None, load)
        assert parts.nbytes == BYTES
        parts.done("text")
        assert load.alive == 0
        assert parts.nbytes == 0
    assert len(load.loaded) == 3


@pytest.mark.parametrize("resident", [0, 1, 2])
def test_a_part_on_the_host_is_lent(resident: int) -> None:
    """The device holds what is in no block, the blocks that stay, and two more at most; nothing after the stage."""
    parts, load, x = Residency(), Loader(), torch.randn(3, 100)
    parts.follow(places("host", resident))
    assert parts.is_hosted("vae")
    net = parts.get("vae", None, load)
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    held = parts.nbytes
    assert REST + 2 * BLOCK <= held < REST + 2 * BLOCK + 5 * 256
    used = net(x)
    assert torch.equal(net(x), used)
    assert parts.nbytes == held
    parts.done("vae")
    assert parts.nbytes == 0
    assert parts.host_bytes == BYTES
    assert parts.get("vae", None, load) is net
    assert torch.equal(net(x), used)
    assert len(load.loaded) == 1
    parts.done("vae")
    assert all(torch.equal(weight, before[name]) for name, weight in net.state_dict().items())


def test_a_part_that_was_given_up_does_not_run() -> None:
    parts = Residency()
    parts.follow(places("host"))
    net = parts.get("vae", None, Part)
    parts.done("vae")
    with pytest.raises(RuntimeError, match="run after its part was given up"):
        net(torch.randn(1, 100))


def test_the_plan_may_change_between_requests() -> None:
    parts, load = Residency(), Loader()
    parts.get("vae", None, load)
    parts.follow(places("host", 1))
    assert load.alive == 0
    first = parts.get("vae", None, load)
    parts.follow(places("host", 2))
    assert parts.nbytes == 0
    assert parts.get("vae", None, load) is first
    del first
    parts.follow(places("disk", 2))
    assert load.alive == 0


def test_loading_in_the_background() -> None:
    parts, load = Residency(), Loader()
    load.go.clear()
    parts.start("vae", None, load)
    parts.start("vae", None, load)  # is under way already
    parts.start("text", None, load)
    load.go.set()
    part = parts.get("vae", None, load)
    assert isinstance(part, nn.Module)
    parts.get("text", None, load)
    assert len(load.loaded) == 2
    parts.start("vae", None, load)  # is there
    assert parts.get("vae", None, load) is part


def test_a_failure_in_the_background_is_raised_at_first_use_and_then_forgotten() -> None:
    parts, load = Residency(), Loader()

    def fails() -> nn.Module:
        raise MemoryError("no more")

    parts.start("vae", None, fails)
    parts.start("text", None, load)
    assert isinstance(parts.get("text", None, load), nn.Module)
    with pytest.raises(MemoryError, match="no more"):
        parts.get("vae", None, load)
    assert isinstance(parts.get("vae", None, load), nn.Module)


def test_what_loads_in_the_background_goes_when_it_is_not_wanted_any_more() -> None:
    for other in (None, "another precision"):
        parts, load = Residency(), Loader()
        load.go.clear()
        parts.start("vae", None, load)
        if other is None:
            parts.rest()  # a request was broken off: nobody waits
            load.go.set()
            parts.follow({})
            assert load.alive == 0
            assert parts.nbytes == 0
        else:
            load.go.set()
            parts.get("vae", other, load)
            assert load.alive == 1


def test_release_and_clear() -> None:
    parts, load = Residency(), Loader()
    for key in "abc":
        parts.get(key, None, load)
    parts.release("a")
    parts.release("a")  # again, or never loaded: nothing to do
    parts.done("never")
    assert load.alive == 2
    parts.clear()
    assert load.alive == parts.nbytes == 0


def test_a_failed_load_leaves_nothing() -> None:
    parts, load = Residency(), Loader()

    def fails() -> nn.Module:
        raise MemoryError

    with pytest.raises(MemoryError):
        parts.get("vae", None, fails)
    assert parts.nbytes == 0
    assert isinstance(parts.get("vae", None, load), nn.Module)


def test_what_was_not_freed_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Residency("cuda")
    parts.follow(places("host"))
    taken = [SLACK + 10**9]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: taken[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts.tidy(foreign=10**9)  # someone else's
    with pytest.warns(Note, match="1.5 GB more than planned are still taken on cuda"):
        parts.tidy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts.tidy()  # once
