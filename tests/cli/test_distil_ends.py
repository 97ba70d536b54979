"""How the distillation commands end: no threads are left, and after an error nobody waits for anybody."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from turbowan.cli.distil import Clips
from turbowan.train import distributed
from turbowan.train.shard_writer import write_shards
from turbowan.train.shards import Sample
from turbowan.train.world import WorldConfig

CONFIG = """
[trainer]
steps = 1
batch = 3
lr = { student = 1e-3 }
"""


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    clip = Sample(torch.zeros(16, 1, 4, 6), torch.zeros(2, 8), "")
    write_shards(lambda numbers: (clip for _ in numbers), 2, tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("error", [None, KeyError])
def test_reading_ends_with_the_work(shards: Path, error: type[Exception] | None) -> None:
    before = set(threading.enumerate())
    clips = Clips([str(shards)], None, None, "tiny-base")
    with suppress(KeyError), clips.source(WorldConfig(), 1, 0, torch.device("cpu")) as source:
        source.batch(0, range(1))
        readers = set(threading.enumerate()) - before
        assert readers
        if error is not None:
            raise error
    for thread in readers:
        thread.join(10)
    assert not any(thread.is_alive() for thread in readers)


def test_the_group_is_left_after_success_alone(
    shards: Path, tmp_path: Path, command_line: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To leave is to wait for all: after an error in one process the others wait for it elsewhere, or are gone."""
    left: list[int] = []
    monkeypatch.setattr(distributed, "leave", lambda: left.append(1))
    (tmp_path / "sla.toml").write_text(CONFIG)
    how = ("--out", tmp_path / "run", "--teacher", tmp_path / "none.pth", "--config", tmp_path / "sla.toml")
    code, _, error = command_line("train", "sla", *how, "--data", shards, "--device", "cpu")
    assert (code, left) == (2, []), error
    assert "batch of 3 clips is no part of the 2" in error
    code, _, error = command_line("train", "shards", "--out", tmp_path / "new", "--count", 0, "--device", "cpu")
    assert (code, left) == (2, []), error
    (tmp_path / "small.toml").write_text("[world]\nframes = 5\nheight = 32\nwidth = 48\n")
    world = ("--config", tmp_path / "small.toml", "--count", 1)
    code, _, error = command_line("train", "shards", "--out", tmp_path / "new", *world, "--device", "cpu")
    assert (code, left) == (0, [1]), error
