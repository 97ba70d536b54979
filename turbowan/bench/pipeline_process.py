"""The process that `bench pipeline` times: `python -m turbowan.bench.pipeline_process <spec as JSON>`.

It generates as a program does and prints a JSON line whenever something is done, which the process that started it
stamps with the time.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

SETTINGS = ("num_steps", "attention", "precision", "linears")  # that a record repeats


def main(spec: dict[str, Any]) -> None:
    """Carry out `spec`: "model" (a folder), "device", "request" (of `GenerateRequest`), "runs" (in this process),
    "image" (width and height of a made picture, or null), "target" (a file) and "cap" (bytes of GPU memory that the
    allocator may take, or null).
    """
    from ..errors import TurbowanError

    try:
        _generate(spec)
    except TurbowanError as error:
        _say(done="refused", why=str(error))


def _generate(spec: dict[str, Any]) -> None:
    import torch

    from ..engine import Engine, choose_device
    from ..request import GenerateRequest
    from .memory_watch import MemoryWatch, host_memory

    _say(done="imports")
    warnings.simplefilter("ignore")
    device = choose_device(spec["device"])
    watch = MemoryWatch(device)
    if spec["cap"] is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, spec["cap"] / total), device)
    engine = Engine.load(spec["model"], device=device)
    image = None if spec["image"] is None else made_picture(*spec["image"])
    request = GenerateRequest(**spec["request"], image=image)
    _say(done="engine")
    for _ in range(spec["runs"]):
        started = time.perf_counter()
        result = engine.generate(request)
        size = _write(result, Path(spec["target"]))
        facts = {
            "seconds": time.perf_counter() - started,
            "shape": list(result.frames.shape[:3]),
            "settings": {name: result.settings[name] for name in SETTINGS},
            "stages": result.stages,
            "file": size,
            "gpu_by_pytorch": result.peak_memory["gpu"],
            "host_peak": result.peak_memory["host"],
        }
        del result
        gc.collect()
        _say(done="run", **facts, gpu=watch.peak(), gpu_source=watch.source, host=host_memory())


def _write(result: Any, target: Path) -> int | None:
    """Bytes of the file; None without PyAV, which writes it."""
    try:
        paths = result.save(target)
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        return None
    return sum(path.stat().st_size for path in paths)


def made_picture(width: int, height: int) -> Any:
    """uint8 [H, W, 3], smooth colours with fine detail, the same every time."""
    import numpy as np

    rows, columns = np.mgrid[0:height, 0:width] / height
    waves = [np.sin(7 * rows * k + 5 * columns) + 0.3 * np.sin(90 * columns * k - 60 * rows) for k in (1, 1.3, 1.7)]
    return (np.stack(waves, axis=2) * 80 + 127).clip(0, 255).astype(np.uint8)


def _say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
