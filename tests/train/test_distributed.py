"""Two processes under torchrun: their gradients become the mean, their clock rank 0's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import turbowan

SCRIPT = """
import torch
from turbowan.train import distributed
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
distributed.leave()
print(f"rank {rank} agrees\\n", end="", flush=True)  # in one piece: both write to one pipe
"""


def test_two_processes_agree(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120,
        env={"PYTHONPATH": str(Path(turbowan.__file__).parent.parent), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if "agrees" in line) == ["rank 0 agrees", "rank 1 agrees"]
