"""A clone in custom_nodes: loaded by its path, under another name, beside the installed package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent


def test_a_clone_works_beside_the_installed_package(tmp_path: Path) -> None:
    """As ComfyUI loads it. Operations are registered once in PyTorch; both copies compute."""
    clone = tmp_path / "turbo-wan.main"
    clone.symlink_to(REPOSITORY)
    code = f"""
import importlib.util, sys, torch, turbowan.ops, turbowan.comfy
path = {str(clone)!r}
name = path.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, path + "/__init__.py", submodule_search_locations=[path])
module = importlib.util.module_from_spec(spec); sys.modules[name] = module; spec.loader.exec_module(module)
assert list(module.NODE_CLASS_MAPPINGS) == list(turbowan.comfy.NODE_CLASS_MAPPINGS)
assert module.NODE_CLASS_MAPPINGS["TurboWanSigmas"] is not turbowan.comfy.NODE_CLASS_MAPPINGS["TurboWanSigmas"]
both = module.NODE_CLASS_MAPPINGS, turbowan.comfy.NODE_CLASS_MAPPINGS
grids = [each["TurboWanSigmas"]().sigmas(4, 200.0, 0.9) for each in both]
assert all(torch.equal(*pair) for pair in zip(*grids))
ops = importlib.import_module(name + ".turbowan.ops")
x = torch.randn(3, 8)
assert torch.equal(ops.rms_norm(x, torch.ones(8), 1e-6), turbowan.ops.rms_norm(x, torch.ones(8), 1e-6))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
