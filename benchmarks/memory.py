"""Generate within budgets of a GPU's memory, with random weights of true size, judged by the device's own counter.

    python benchmarks/memory.py > memory.jsonl                        # all of CASES: an H200 and 60 GB of disk
    python benchmarks/memory.py --case "A14B-I2V 720p" --budget 24GB  # one of them, one budget ("none": all there is)

One JSON line a run: the plan's peak, PyTorch's, and the device's beyond its idle value, seconds by stage. The device is
polled by a thread; its idle value is taken before this process touches CUDA's context, so that it counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

CASES = {  # name -> model of `memory.catalog.COMMON`, width, height, file's linear layers in 8 bits, budgets
    "A14B-I2V 720p": ("A14B-I2V int8", 1280, 720, ("none", "24GB", "16GB", "12GB")),
    "A14B-I2V 480p": ("A14B-I2V int8", 832, 480, ("none", "16GB", "12GB")),
    "1.3B 480p": ("1.3B", 832, 480, ("none", "6GB")),
}


def used() -> int:
    """Bytes of the first GPU in use by anyone, as its driver counts them."""
    line = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return int(line.split()[0]) << 20


@contextmanager
def polled(read: Callable[[], int]) -> Iterator[list[int]]:
    """The largest value that a function gives while this is open, in a list of one."""
    peak, over = [read()], Event()

    def poll() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], read())

    thread = Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def write_model(folder: Path, model: str, layers: int | None) -> Path:
    """Random weights of a common model's true size, unless they are there. Written once, tensors of one block at a time.

    Args:
        layers: blocks of the text encoder; all 24 of umT5-xxl if None.
    """
    import torch

    from turbowan.bench.random_weights import write_common_model

    torch.manual_seed(0)
    return write_common_model(folder, model, layers)


def run(case: str, budget: str, folder: Path, repeats: int) -> Iterator[dict[str, object]]:
    """Records of one process: the first request cold, the others warm."""
    idle = used()
    import numpy as np
    import torch

    from turbowan import Engine, GenerateRequest
    from turbowan.bench.pipeline import machine_facts

    model, width, height, _ = CASES[case]
    engine = Engine.load(folder, device="cuda")
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    request = GenerateRequest(
        prompt="a red circle moves right on a blue background", image=picture if engine.needs_image else None,
        width=width, height=height, num_frames=81, gpu_budget=None if budget == "none" else budget,
        precision="int8" if model.endswith("int8") else "bf16",
    )  # fmt: skip
    plan = engine.plan(request)
    frames = []
    device = torch.device("cuda", 0)
    free_before = torch.cuda.mem_get_info(device)

    def in_use() -> int:
        free, total = torch.cuda.mem_get_info(device)
        return total - free

    offset = used() - (free_before[1] - free_before[0])  # the two counters differ by what the driver keeps
    for index in range(1 + repeats):
        with polled(in_use) as peak:
            started = time.perf_counter()
            result = engine.generate(request)
            seconds = time.perf_counter() - started
        frames.append(result.frames)
        yield {
            "bench": "memory", "case": case, "budget": budget, "run": "warm" if index else "cold",
            **machine_facts(device), "plan": plan.summary, "planned_gb": round(plan.peak / 1e9, 2),
            "pytorch_gb": round(torch.cuda.max_memory_reserved(device) / 1e9, 2),
            "device_gb": round((peak[0] + offset - idle) / 1e9, 2),
            "host_gb": round(result.peak_memory["host"] / 1e9, 2), "total_s": round(seconds, 2),
            "seconds": {name: round(value, 2) for name, value in result.stages.items()},
            "same": bool(np.array_equal(frames[0], frames[-1])), "mean": float(frames[-1].mean()),
            "checksum": int(frames[-1].astype(np.int64).sum()),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--budget", action="append")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "turbowan-memory")
    parser.add_argument("--text-layers", type=int, help="Blocks of the text encoder, for small disks; 24 if not given.")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--here", action="store_true", help="In this process: for one case and one budget.")
    args = parser.parse_args()
    for case in args.case or list(CASES):
        folder = args.scratch / CASES[case][0].replace(" ", "-")
        if args.here:
            for record in run(case, (args.budget or ["none"])[0], folder, args.repeats):
                print(json.dumps(record), flush=True)
            continue
        write_model(folder, CASES[case][0], args.text_layers)
        for budget in args.budget or CASES[case][3]:  # a process each: the device's idle value is then its own
            command = [
                sys.executable, __file__, "--here", "--case", case, "--budget", budget, "--scratch", str(args.scratch),
                "--repeats", str(args.repeats),
            ]  # fmt: skip
            done = subprocess.run(command, check=False)
            if done.returncode:
                print(json.dumps({"bench": "memory", "case": case, "budget": budget, "failed": done.returncode}))


if __name__ == "__main__":
    main()
