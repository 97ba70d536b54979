"""Two processes under torchrun: they agree with each other and, sharded, with one process, whichever starts or ends."""

from __future__ import annotations

import re

import pytest
import torch

from turbowan.train import checkpoint, curve

SCRIPT = """
import sys
from pathlib import Path
import torch
from turbowan.errors import MachineError
from turbowan.train import checkpoint, distributed
from turbowan.train.trainer import mend_and_clip
device = distributed.join(torch.device("cpu"))
rank = distributed.rank()
parameters = [torch.zeros(size, requires_grad=True) for size in ((3, 5), (2,), (1,))]
for i, p in enumerate(parameters[:2]):
    p.grad = torch.full_like(p, 10.0 * i + rank)
distributed.average_gradients(parameters)
assert distributed.world_size() == 2
assert [float(p.grad.flatten()[0]) for p in parameters[:2]] == [0.5, 10.5], [p.grad for p in parameters]
assert parameters[2].grad is None
assert distributed.from_rank_0(3.25 + rank, device) == 3.25
assert distributed.average(torch.tensor([1.0 + rank, 4.0])).tolist() == [1.5, 4.0]
assert distributed.rows_of_rank(12, 3) == range(6 * rank, 6 * rank + 6)
try:
    distributed.rows_of_rank(6, 2)
except MachineError as error:
    assert "a batch of 6 cannot be split evenly over 2 processes x 2 parts" in str(error)
else:
    raise AssertionError("6 rows were split into 4 parts")

layer = torch.nn.Linear(3, 4)
distributed.place(layer, device)
loss = layer(torch.ones(1, 3))[0]
(loss[0] * float("nan") + loss[1] * float("inf") + 3 * loss[3]).backward()
norm, nonfinite = mend_and_clip(list(layer.parameters()), 1.0)
assert (float(norm), float(nonfinite)) == (6.0, 1.0), (norm, nonfinite)
gradient = distributed.whole(layer.weight.grad)
assert torch.equal(gradient[:3], torch.zeros(3, 3)) and torch.allclose(gradient[3], torch.tensor(0.5)), gradient

weight = distributed.whole(layer.weight)
path = checkpoint.save(Path(sys.argv[1]), 5, {"layer.weight": layer.weight})
if rank == 0:  # alone, while the other waits at the end
    assert torch.equal(checkpoint.read(path, "layer.")["weight"], weight)
distributed.wait_for_all()
distributed.leave()
print(f"rank {rank} agrees\\n", end="", flush=True)  # in one piece: both write to one pipe
"""


def test_two_processes_agree(tmp_path, torchrun):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = torchrun(script, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if "agrees" in line) == ["rank 0 agrees", "rank 1 agrees"]


def assert_same(ours, theirs, tolerance: float) -> None:
    """Two runs ended with the same state, and their curves agree line by line."""
    lines, others = (curve.read(folder / curve.CURVE_FILE) for folder in (ours, theirs))
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() - {"step", "seconds"}:
            assert line[key] == pytest.approx(other[key], rel=tolerance), (line, other)
    a, b = (checkpoint.read(checkpoint.saved(folder)[-1], "") for folder in (ours, theirs))
    assert a.keys() == b.keys()
    for kind in (r"model\.student\.", r"model\.critic\.", r"average\.", r"optimizer\..*_avg$", r"optimizer\..*_sq$"):
        keys = [key for key in a if re.match(kind, key)]
        assert keys
        one, two = (torch.cat([state[key].double().flatten() for key in keys]) for state in (a, b))
        assert float((one - two).norm() / two.norm()) <= tolerance, kind  # 2e-7 of the weights was seen
    counts = ("step", "updates.student", "updates.critic")
    assert [a[key] for key in counts] == [b[key] for key in counts]


@pytest.mark.slow
def test_two_sharded_processes_are_one_whatever_happens(tmp_path, torchrun, small_run, fresh_seed):
    """12 steps on one process against: two; one gone on by two; two of which one is killed; two gone on by one."""
    common = ["--log-steps", "2", "--seed", str(fresh_seed % 1000)]

    def run(folder: str, *arguments: str) -> list[str]:
        return [str(tmp_path / folder), *common, *arguments]

    small_run.main(run("one"))
    small_run.main(run("one-then-two", "--steps", "4"))
    killed = run("killed", "--save-minutes", "1e-6", "--kill-at", "7")
    done = torchrun(small_run.script, *run("two"), "then", *run("two-then-one", "--steps", "4"), "then", *killed)
    assert "Signal 9 (SIGKILL)" in done.stderr, done.stderr
    assert [path.name for path in checkpoint.saved(tmp_path / "killed")] == ["step-00000004", "step-00000006"]

    small_run.main(run("two-then-one", "--accumulate", "2"))
    after = run("one-then-two", "--activations", "mm_only")
    done = torchrun(small_run.script, *run("killed", "--activations", "block"), "then", *after)
    assert done.returncode == 0, done.stderr
    for folder in ("two", "two-then-one", "killed", "one-then-two"):
        assert_same(tmp_path / folder, tmp_path / "one", 1e-4)
