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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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
    from ..engine import choose_device
    from ..memory.room import capped

    _say(done="imports")
    warnings.simplefilter("ignore")
    device = choose_device(spec["device"])
    with capped(device, spec["cap"]):
        _generate_on(device, spec)


def _generate_on(device: torch.device, spec: dict[str, Any]) -> None:
    import torch

    from ..engine import Engine
    from ..request import GenerateRequest
    from .memory_watch import MemoryWatch, host_memory

    watch = MemoryWatch(device)
    engine = Engine.load(spec["model"], device=device)
    image = None if spec["image"] is None else made_picture(*spec["image"])
    words = spec["request"]["prompt"].split()
    _say(done="engine")
    for i in range(spec["runs"]):
        # a prompt that was read before would not be read again
        own = " ".join(words[i % len(words) :] + words[: i % len(words)])
        request = GenerateRequest(**{**spec["request"], "prompt": own}, image=image)
        started = time.perf_counter()
        result, size = _make(engine, request, Path(spec["target"]))
        facts = {
            "seconds": time.perf_counter() - started,
            "shape": list(result.frames.shape[:3]),
            "settings": {name: result.settings[name] for name in SETTINGS},
            "stages": result.stages,
            "file": size,
            "gpu_by_pytorch": result.peak_memory["gpu"],
            "gpu_reserved": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0,
            "gpu_retries": torch.cuda.memory_stats(device)["num_alloc_retries"] if device.type == "cuda" else 0,
            "host_peak": result.peak_memory["host"],
        }
        del result
        gc.collect()
        _say(done="run", **facts, gpu=watch.peak(), gpu_source=watch.source, host=host_memory())


def _make(engine: Any, request: Any, target: Path) -> tuple[Any, int | None]:
    """The result, and bytes of its file, written while it is decoded; None without PyAV, which writes it."""
    try:
        from ..media.saving import VideoFiles
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        return engine.generate(request), None
    with VideoFiles(target) as files:
        result = engine.generate(request, sink=files)
        return result, sum(path.stat().st_size for path in files.close(result))


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
