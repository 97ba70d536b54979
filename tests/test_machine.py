"""Facts about the machine, and which versions of PyTorch are refused."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from turbowan import machine
from turbowan.bench.memory_watch import host_memory
from turbowan.errors import MachineError
from turbowan.machine import trim_heap

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

UNMEASURED = "PyTorch {} is supported but not measured by us; tested: 2.11 (on a GPU) and 2.13 (on a CPU)"
PROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.mark.parametrize("version", ["2.7.0", "2.7.1+cu126", "2.8.0", "2.10.0.dev20251101", "2.13.0+cpu", "3.0"])
def test_pytorch_that_serves(version: str) -> None:
    assert machine.torch_problem(version) is None


@pytest.mark.parametrize("version", ["1.13.1", "2.6.0", "2.0", "2.9.0", "2.9.1+cu128", "2.9.0a0+git1234", "2.9"])
def test_pytorch_that_does_not(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(MachineError, match=rf"PyTorch {re.escape(version)} .*; install torch >= 2"):
        machine.check_torch()


@pytest.mark.parametrize(
    ("version", "on_gpu", "line"),
    [
        ("2.11.0+cu130", True, None),
        ("2.13.0+cpu", False, None),
        ("2.13.1", False, None),
        ("2.7.1", True, UNMEASURED.format("2.7.1")),
        ("2.13.0", True, UNMEASURED.format("2.13.0")),
        ("2.9.1", True, None),  # a problem, which says more
    ],
)
def test_pytorch_that_was_not_measured(version: str, on_gpu: bool, line: str | None) -> None:
    assert machine.torch_note(version, on_gpu) == line


def test_the_required_packages_are_those_of_the_project() -> None:
    dependencies = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    found = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in dependencies)  # type: ignore[union-attr]
    found.pop("tomli")  # part of Python from 3.11 on
    assert found == machine.REQUIRED


def test_windows_tells_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(pointer: Any) -> int:
        status = pointer._obj
        assert status.length == ctypes.sizeof(status) == 64
        status.total, status.free = 32 * 10**9, 20 * 10**9
        return 1

    def missing(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(machine.Path, "read_text", missing)
    monkeypatch.setattr(machine.sys, "platform", "win32")
    kernel = SimpleNamespace(GlobalMemoryStatusEx=answer)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    assert machine.free_memory() == 20 * 10**9


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="C's allocator knows no way")
def test_what_was_freed_goes_back_to_the_system() -> None:
    pieces = [bytes(50_000) for _ in range(4000)]
    taken = host_memory()["own"]
    del pieces[:-1]  # what the last one keeps from shrinking
    trim_heap()
    assert host_memory()["own"] < taken - 150 * 10**6


def test_versions_compare_as_numbers() -> None:
    versions: dict[str, str | None] = dict.fromkeys(machine.REQUIRED, "100.0")
    assert machine.package_problems(versions) == []
    versions |= {"numpy": "1.9.9", "rich": "13", "av": "9"}
    assert [line.split(" is ")[0] for line in machine.package_problems(versions)] == ["numpy 1.9.9", "av 9"]


def test_free_disk_of_a_place_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert machine.free_disk(tmp_path / "not" / "yet") == pytest.approx(machine.free_disk(tmp_path), rel=0.1)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (4_548_313, "4.5 MB"), (28_577_000_000, "28.6 GB"), (16_000, "16.0 kB")],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert machine.size_text(count) == text
