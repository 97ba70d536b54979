"""What memory there is, and how PyTorch's allocator is set up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from turbowan.machine import left_in_container
from turbowan.memory import room
from turbowan.memory.room import Room, segments_grow


def test_an_allocator_whose_segments_do_not_grow_loses_more() -> None:
    growing, fixed = (Room(24 * 10**9, 64 * 10**9, grows=grows) for grows in (True, False))
    for stage in ("denoise", "decode"):
        assert 1 < growing.spread(stage) < fixed.spread(stage)
        assert Room(8 * 10**9, 8 * 10**9, "cpu").spread(stage) == 1


@pytest.mark.parametrize(
    ("settings", "backend", "wanted"),
    [
        ("", "native", sys.platform == "linux"),
        ("expandable_segments:True,garbage_collection_threshold:0.8", "native", True),
        ("max_split_size_mb:128", "native", False),
        ("backend:cudaMallocAsync", "cudaMallocAsync", True),
    ],
)
def test_what_the_user_set_up_stays(
    settings: str, backend: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    monkeypatch.setattr(room.platform, "release", lambda: "6.1")
    if settings:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", settings)
    assert segments_grow() is wanted
    assert room.user_settings() == settings


def test_pytorch_has_the_switch() -> None:
    """A private name, in every version we support; elsewhere this fails before users do."""
    places = (torch._C, "_accelerator_setAllocatorSettings"), (torch.cuda.memory, "_set_allocator_settings")
    assert any(hasattr(*place) for place in places)


@pytest.mark.parametrize(
    ("limit", "used", "details", "prefix"),
    [
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ],
)
def test_a_containers_limit(limit: str, used: str, details: str, prefix: str, tmp_path: Path) -> None:
    assert left_in_container(tmp_path) == []
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text("8000000000\n")
    (tmp_path / used).write_text("5000000000\n")
    (tmp_path / details).write_text(f"{prefix}inactive_file 1000000000\n{prefix}active_file 500000000\nanon 1\n")
    assert left_in_container(tmp_path) == [4_500_000_000]
    (tmp_path / limit).write_text("max\n")
    assert left_in_container(tmp_path) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_segments_grow_where_memory_is_tight() -> None:
    if not segments_grow() or room.user_settings():
        pytest.skip("this allocator is set up otherwise")
    for tight in (True, False):
        torch.cuda.empty_cache()
        with room.capped(torch.device("cuda"), None, tight):
            piece = torch.empty(2**28, dtype=torch.uint8, device="cuda")
        (segment,) = (
            found for found in torch.cuda.memory_snapshot()
            if found["address"] <= piece.data_ptr() < found["address"] + found["total_size"]
        )  # fmt: skip
        assert segment["is_expandable"] is tight
        del piece
