"""States on the disk: whole or not there, whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import resource
import time
from pathlib import Path

import pytest
import torch

from turbowan.errors import CheckpointError
from turbowan.train import checkpoint


def state_of(step: int) -> dict[str, torch.Tensor]:
    """Tensors that all tell the step."""
    return {f"part.{i}": torch.full((20_000 + i,), float(step)) for i in range(20)} | {"step": torch.tensor(step)}


def test_a_state_comes_back_in_place(tmp_path, fresh_seed):
    kept = {
        "net.weight": torch.randn(5, 3), "net.bias": torch.randn(3).to(torch.bfloat16),
        "count": torch.tensor(fresh_seed), "seconds": torch.tensor(0.1, dtype=torch.float64),
    }  # fmt: skip
    path = checkpoint.save(tmp_path, 12, kept)
    assert (path.name, checkpoint.step_of(path)) == ("step-00000012", 12)
    into = {key: torch.zeros_like(value) for key, value in kept.items()}
    tensors = dict(into)
    checkpoint.load(path, into)
    assert all(into[key] is tensors[key] and torch.equal(into[key], kept[key]) for key in kept)
    assert checkpoint.read(path, "net.").keys() == {"weight", "bias"}
    with pytest.raises(CheckpointError, match=r"step-00000012 holds nothing named other\."):
        checkpoint.read(path, "other.")


def test_the_last_two_are_kept_by_their_number(tmp_path):
    (tmp_path / ".step-00000003.part").mkdir()  # of a run that was killed
    (tmp_path / "step-notes").mkdir()
    for step in (99_999_999, 7, 100_000_000):
        checkpoint.save(tmp_path, step, state_of(step))
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["step-99999999", "step-100000000"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-100000000", "step-99999999", "step-notes"]


def _save_until_killed(folder: Path, first: int) -> None:
    torch.set_num_threads(1)
    for step in range(first, first + 10_000):
        checkpoint.save(folder, step, state_of(step))


def test_a_kill_at_any_moment_leaves_a_whole_state(tmp_path, fresh_seed):
    rng = random.Random(fresh_seed)
    processes = multiprocessing.get_context("fork")
    checkpoint.save(tmp_path, 1, state_of(1))
    last = 1
    for _ in range(6):
        process = processes.Process(target=_save_until_killed, args=(tmp_path, last + 1))
        process.start()
        time.sleep(rng.uniform(0.05, 0.5))
        process.kill()
        process.join()
        newest = checkpoint.saved(tmp_path)[-1]
        found = checkpoint.read(newest, "")
        last = checkpoint.step_of(newest)
        assert found.keys() == state_of(last).keys()
        assert all(torch.equal(value, state_of(last)[key]) for key, value in found.items())
    assert last > 1, "no state was written in six tries"


def test_a_disk_that_is_full_keeps_the_state_before(tmp_path, monkeypatch):
    """The limit on a file's size stands for the disk: the system refuses to write on, half-way through a tensor."""
    checkpoint.save(tmp_path, 1, state_of(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(CheckpointError) as error:
            checkpoint.save(tmp_path, 2, state_of(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"cannot write {tmp_path / 'step-00000002'} (")
    assert "1.6 MB to write" in message
    assert message.endswith("step-00000001 is whole, and the next run goes on from it")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.read(tmp_path / "step-00000001", "")["step"] == 1
    checkpoint.save(tmp_path, 2, state_of(2))
    assert checkpoint.read(tmp_path / "step-00000002", "")["step"] == 2


@pytest.mark.parametrize("damage", ["cut", "index cut", "no index", "no file", "names", "shapes"])
def test_a_damaged_state_is_one_line(tmp_path, damage):
    path = checkpoint.save(tmp_path, 3, state_of(3))
    data, index, wanted = path / "__0_0.distcp", path / ".metadata", state_of(0)
    if damage == "cut":
        data.write_bytes(data.read_bytes()[:100_000])
    elif damage == "index cut":
        index.write_bytes(index.read_bytes()[:100])
    elif damage == "no index":
        index.unlink()
    elif damage == "no file":
        data.unlink()
    elif damage == "names":
        wanted["more"] = torch.zeros(3)
    else:
        wanted["part.3"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"step-00000003 is not a state of this run \(.+\)") as error:
        checkpoint.load(path, wanted)
    assert "\n" not in str(error.value)


def test_no_code_runs_from_an_index(tmp_path):
    path = checkpoint.save(tmp_path, 3, state_of(3))
    touched = tmp_path / "touched"

    class Code:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(touched),)

    (path / ".metadata").write_bytes(pickle.dumps(Code()))
    for work in (lambda: checkpoint.load(path, state_of(3)), lambda: checkpoint.read(path, "")):
        with pytest.raises(CheckpointError, match=r"its index names posix\.mkdir"):
            work()
    assert not touched.exists()
