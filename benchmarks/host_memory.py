"""What a process keeps of the host's memory from request to request, and what locking memory takes (Linux).

    turbowan bench pipeline --preset 1.3B-480p --text-encoder fp8 --folder scratch --write-only
    python benchmarks/host_memory.py requests --model scratch/random-1.3B-bf16 --memory minimal --steps 1
    python benchmarks/host_memory.py locking        # needs a GPU

Tables on standard output.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import mmap
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from turbowan import Engine, GenerateRequest, VideoFiles
from turbowan.bench.memory_watch import host_memory
from turbowan.bench.presets import PROMPT
from turbowan.memory.locked import whole_pages

MIB, GIB = 2**20, 2**30
PAGE = 4096
FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class Heap(ctypes.Structure):
    """glibc's mallinfo2. uordblks: bytes in use. fordblks: freed, but kept."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in FIELDS)


def requests(model: str, memory: str, count: int, steps: int, device: str) -> None:
    """Own, in use, freed but kept and cached embeddings after each of many requests, in MiB; another prompt each."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = Heap
    engine, words = Engine.load(model, device=device), PROMPT.split()
    print("request  seconds      own   in use     kept  prompts")
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            prompt = " ".join(words[i % len(words) :] + words[: i % len(words)])
            started = time.perf_counter()
            with VideoFiles(Path(folder) / "video.mp4") as files:
                request = GenerateRequest(prompt=prompt, memory=memory, seed=i, num_steps=steps)
                files.close(engine.generate(request, sink=files))
            seconds = time.perf_counter() - started
            gc.collect()
            heap, own = libc.mallinfo2(), host_memory()["own"]
            texts = sum(text.nbytes for text in engine.parts.texts._texts.values())
            sizes = (f"{size / MIB:8.1f}" for size in (own, heap.uordblks, heap.fordblks, texts))
            print(f"{i:7}  {seconds:7.2f} ", *sizes, flush=True)


def locking(pieces: int) -> None:
    """Seconds to take 1 GiB of the host's memory, to lock it, and to copy to it from the GPU."""

    def large() -> Tensor:
        mapped = mmap.mmap(-1, GIB + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapped.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(mapped, dtype=torch.uint8)

    ways: dict[str, Callable[[], Tensor]] = {
        "as it comes": lambda: torch.empty(GIB + PAGE, dtype=torch.uint8),
        "written to": lambda: torch.zeros(GIB + PAGE, dtype=torch.uint8).fill_(1),
        "large pages": large,
        "both": lambda: whole_pages(GIB + PAGE),  # as turbowan does
    }
    runtime, source = torch.cuda.cudart(), torch.empty(GIB, dtype=torch.uint8, device="cuda")
    print("               take   lock   copy")
    for name, take in ways.items():
        kept, spent = [], [0.0, 0.0, 0.0]
        for _ in range(pieces):
            marks = [time.perf_counter()]
            memory = take()
            memory = memory[-memory.data_ptr() % PAGE :][:GIB]
            marks.append(time.perf_counter())
            if int(runtime.cudaHostRegister(memory.data_ptr(), GIB, 0)):
                raise SystemExit(f"the machine does not lock {(len(kept) + 1)} GiB; take fewer --pieces")
            marks.append(time.perf_counter())
            memory.copy_(source)
            torch.cuda.synchronize()
            marks.append(time.perf_counter())
            spent = [s + b - a for s, a, b in zip(spent, marks, marks[1:], strict=False)]
            kept.append(memory)
        print(f"{name:12}", *(f"{s / pieces:6.3f}" for s in spent), flush=True)
        for memory in kept:
            runtime.cudaHostUnregister(memory.data_ptr())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    told = what.add_parser("requests")
    told.add_argument("--model", default="tiny")
    told.add_argument("--memory", default="auto", choices=("auto", "speed", "balanced", "minimal"))
    told.add_argument("--count", type=int, default=24)
    told.add_argument("--steps", type=int, default=1)
    told.add_argument("--device", default="auto")
    locked = what.add_parser("locking")
    locked.add_argument("--pieces", type=int, default=4)
    args = parser.parse_args()
    if args.what == "requests":
        requests(args.model, args.memory, args.count, args.steps, args.device)
    else:
        locking(args.pieces)


if __name__ == "__main__":
    main()
