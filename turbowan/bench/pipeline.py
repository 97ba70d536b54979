"""Prompt to frames at true sizes: seconds per stage and peak memory, first run and later ones."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from ..engine import Engine
from ..request import GenerateRequest


def run_pipeline(folder: Path, request: GenerateRequest, device: str, repeats: int = 1) -> Iterator[dict[str, object]]:
    """Yield one record per run; the first is cold (weights come from their files), the rest are warm.

    Args:
        folder: a model folder, with random weights or real ones.
        repeats: runs after the first.

    Returns:
        Records for JSON: seconds per stage, peak memory in GiB, frames and pixels, machine and commit.
    """
    engine = Engine.load(folder, device=device)
    for index in range(1 + repeats):
        result = engine.generate(request)
        frames, height, width = result.frames.shape[:3]
        yield {
            "bench": "pipeline",
            "case": f"{engine.manifest.name} {width}x{height}x{frames}",
            "run": "cold" if index == 0 else "warm",
            **machine_facts(engine.device),
            "shape": {"frames": frames, "height": height, "width": width, "steps": result.settings["num_steps"]},
            "attention": result.settings["attention"],
            "seconds": {name: round(value, 3) for name, value in result.stages.items()},
            "peak_gib": {name: round(value / 2**30, 2) for name, value in result.peak_memory.items()},
        }


def machine_facts(device: torch.device) -> dict[str, str]:
    """What a published number must carry: the chip, PyTorch, the commit."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True, text=True, cwd=Path(__file__).parent, check=False,
    )  # fmt: skip
    return {"gpu": gpu, "torch": torch.__version__, "commit": commit.stdout.strip() or "unknown"}
