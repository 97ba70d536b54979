"""Memory that is to be locked. Locking needs a GPU, and is tried wherever parts are lent to one."""

from __future__ import annotations

import gc
import mmap
import sys

import pytest
import torch

from turbowan.bench.memory_watch import host_memory
from turbowan.memory.locked import whole_pages

PAGE = 4096


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("pages", [1, 1000, 30_001])
def test_pages_of_its_own(pages: int, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not large:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    with torch.inference_mode():
        memory = whole_pages(pages * PAGE)
        assert not memory.any()
        memory[:] = 7
    assert (memory.dtype, memory.shape) == (torch.uint8, (pages * PAGE,))
    assert memory.data_ptr() % PAGE == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_a_view_keeps_the_memory_and_the_last_one_gives_it_back() -> None:
    before = host_memory()["own"]
    view = whole_pages(2**28)[PAGE:].view(torch.float32)
    view[:] = 3
    gc.collect()
    assert view.sum().item() == 3 * len(view)
    assert host_memory()["own"] > before + 2**27
    del view
    assert host_memory()["own"] < before + 2**27


def test_more_than_there_is() -> None:
    with pytest.raises(RuntimeError):
        whole_pages(2**50)
