"""The package as such: quick to start, quiet about CUDA, and at work under another name beside itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import turbowan

ROOT = Path(turbowan.__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)


def test_help_needs_no_torch_and_at_most_a_second():
    script = "import sys; sys.argv = ['turbowan', '--help']\nfrom turbowan.cli.main import main\n" + (
        "try:\n    main()\nexcept SystemExit:\n    pass\nprint('TORCH' if 'torch' in sys.modules else 'NO TORCH')"
    )
    assert "NO TORCH" in run("-c", script).stdout
    fastest = min(_seconds("-m", "turbowan", "--help") for _ in range(4))
    assert fastest <= 1.0


def _seconds(*arguments: str) -> float:
    started = time.perf_counter()
    assert run(*arguments).returncode == 0
    return time.perf_counter() - started


def test_importing_touches_no_cuda():
    script = (
        "import turbowan, turbowan.engine, torch\nfrom turbowan import ops\n"
        "assert not torch.cuda.is_initialized()\nprint(sorted(turbowan.__all__))"
    )
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    assert "GenerateRequest" in done.stdout


def test_a_clone_under_another_name_beside_the_installed_package():
    """As in ComfyUI's custom_nodes: the same files under a name of their own, both at work in one process."""
    script = f"""
import importlib.util, json, sys
import torch
import turbowan
from turbowan import ops
place = {str(ROOT / "turbowan")!r}
spec = importlib.util.spec_from_file_location("clone_7", place + "/__init__.py", submodule_search_locations=[place])
clone = importlib.util.module_from_spec(spec)
sys.modules["clone_7"] = clone
spec.loader.exec_module(clone)
x = torch.randn(2, 70, 256)
same = torch.equal(ops.rms_norm(x, torch.ones(256), 1e-6), clone.ops.rms_norm(x, torch.ones(256), 1e-6))
engine = clone.Engine.load("tiny", device="cpu")
request = clone.GenerateRequest(prompt="a red circle", num_steps=1, width=32, height=32, num_frames=1)
frames = engine.generate(request).frames
print(json.dumps([same, frames.shape, type(engine).__module__, clone.ops is not ops]))
"""
    done = run("-W", "ignore", "-c", script)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, [1, 32, 32, 3], "clone_7.engine", True]


def test_no_name_twice_or_missing():
    for name in turbowan.__all__:
        assert getattr(turbowan, name) is not None


def test_a_model_is_ready_without_what_only_takes_time():
    """Neither transformers nor torch.compile is imported for a generation: seconds of a program's start."""
    lines = (
        "import sys",
        "from turbowan import Engine, GenerateRequest",
        "size = {'width': 64, 'height': 48, 'num_frames': 1, 'num_steps': 1}",
        "Engine.load('tiny', device='cpu').generate(GenerateRequest(prompt='a red ring', **size))",
        "print([name for name in ('transformers', 'torch._dynamo') if name in sys.modules])",
    )
    out = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
