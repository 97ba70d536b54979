"""Parts are loaded when first asked for and freed by the plan, so that memory holds what the plan says."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from turbowan.memory.residency import Residency


class Loader:
    """Loads a fresh module each time, remembers which still live."""

    def __init__(self) -> None:
        self.loaded: list[weakref.ref[nn.Module]] = []

    def __call__(self) -> nn.Module:
        part = nn.Linear(100, 50)
        part.register_buffer("table", torch.zeros(10, dtype=torch.int8))
        self.loaded.append(weakref.ref(part))
        return part

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.loaded)


BYTES = 4 * (100 * 50 + 50) + 10


def test_a_kept_part_is_loaded_once() -> None:
    parts, load = Residency(keep=True), Loader()
    first = parts.get("vae", torch.float32, load)
    parts.done("vae")
    assert parts.get("vae", torch.float32, load) is first
    assert len(load.loaded) == 1
    del first
    parts.get("vae", torch.bfloat16, load)  # another precision takes its place
    assert (load.alive, len(load.loaded)) == (1, 2)
    assert parts.nbytes == BYTES


def test_a_part_that_is_not_kept_goes_after_its_stage() -> None:
    parts, load = Residency(keep=False), Loader()
    for _ in range(3):
        parts.get("text", None, load)
        assert parts.get("text", None, load) is parts.get("text", None, load)
        assert parts.nbytes == BYTES
        parts.done("text")
        assert load.alive == 0
        assert parts.nbytes == 0
    assert len(load.loaded) == 3


def test_the_plan_may_change_between_requests() -> None:
    parts, load = Residency(keep=True), Loader()
    parts.get("vae", None, load)
    parts.keep = False
    parts.done("vae")
    assert load.alive == 0


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
