"""What memory there is, and how PyTorch's allocator is set up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from turbowan.machine import left_in_container
from turbowan.memory import segments
from turbowan.memory.room import Room, capped

GPU = torch.device("cuda:0")


def test_an_allocator_whose_segments_do_not_grow_loses_more() -> None:
    growing, fixed = (Room(24 * 10**9, 64 * 10**9, grows=grows) for grows in (True, False))
    for stage in ("denoise", "decode"):
        assert 1 < growing.spread(stage) < fixed.spread(stage)
        assert Room(8 * 10**9, 8 * 10**9, "cpu").spread(stage) == 1


@pytest.fixture
def switched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What PyTorch's allocator was told, on a Linux machine whose driver can."""
    told: list[bool] = []
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(segments, "_set", told.append)
    monkeypatch.setattr(segments, "_works", lambda _: True)
    monkeypatch.setattr(segments.sys, "platform", "linux")
    monkeypatch.setattr(segments.platform, "release", lambda: "6.1")
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native", raising=False)
    return told


@pytest.mark.parametrize(
    ("settings", "backend", "grow", "changed"),
    [
        ("", "native", True, True),
        ("expandable_segments:True,garbage_collection_threshold:0.8", "native", True, False),
        ("max_split_size_mb:128", "native", False, False),
        ("", "cudaMallocAsync", True, False),
    ],
)
def test_what_the_user_set_up_stays(
    settings: str, backend: str, grow: bool, changed: bool, switched: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    if settings:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", settings)
    assert segments.segments_grow(GPU) is grow
    with capped(GPU, None, tight=True):
        assert switched == [True] * changed
    assert switched == [True, False] * changed


@pytest.mark.parametrize("where", ["Windows", "WSL", "ROCm", "a driver that cannot"])
def test_where_segments_cannot_grow(where: str, switched: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "Windows":
        monkeypatch.setattr(segments.sys, "platform", "win32")
    elif where == "WSL":
        monkeypatch.setattr(segments.platform, "release", lambda: "5.15-microsoft-standard-WSL2")
    elif where == "ROCm":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    else:
        monkeypatch.setattr(segments, "_works", lambda _: False)
    assert not segments.segments_grow(GPU)
    with capped(GPU, None, tight=True):
        assert switched == []


def test_requests_that_overlap_share_the_switch(switched: list[bool]) -> None:
    with capped(GPU, None, tight=True):
        with pytest.raises(KeyError), capped(GPU, None, tight=True):
            raise KeyError
        assert switched == [True]
    assert switched == [True, False]


def test_pytorch_has_the_switch() -> None:
    """By one of its private names."""
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
    always = "expandable_segments:True" in segments.user_settings()
    for tight in (True, False):
        torch.cuda.empty_cache()
        with capped(GPU, None, tight):
            piece = torch.empty(2**28, dtype=torch.uint8, device="cuda")
        (segment,) = (
            found for found in torch.cuda.memory_snapshot()
            if found["address"] <= piece.data_ptr() < found["address"] + found["total_size"]
        )  # fmt: skip
        assert segment["is_expandable"] is (always or (tight and segments.segments_grow(GPU)))
        del piece
