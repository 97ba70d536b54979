"""Prompt to written file at true sizes: seconds per stage and peak memory, from the start of a process and warm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from ..checkpoints.manifest import Manifest
from ..clock import STAGES
from ..errors import MachineError

_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")  # where compiled kernels are kept
_CHUNK = 16 << 20  # bytes


@dataclass(frozen=True)
class Trial:
    """What is run and how often.

    request: fields of `GenerateRequest`. image: width and height of a made first frame, for image-to-video models.
    warm: runs after a process's first. first_ever: also a process that finds no compiled kernels, before the others.
    cap: bytes of GPU memory that PyTorch may take in the process, as on a smaller card. facts: for the records.
    """

    manifest: Manifest
    folder: Path
    request: Mapping[str, Any]
    device: str = "auto"
    image: tuple[int, int] | None = None
    warm: int = 3
    first_ever: bool = True
    cap: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def run_pipeline(trial: Trial) -> Iterator[dict[str, Any]]:
    """Yield records: "first-ever" (a new process, no compiled kernels), "cold" (a new process, all files read before
    and kept by the system as far as memory goes), then "warm" (medians of later runs in that process); or "refused".

    Raises:
        MachineError: the process that is timed ends without a word.
    """
    facts = machine_facts(torch.device("cuda" if _on_gpu(trial.device) else "cpu"))
    yield {"bench": "pipeline", "case": trial.manifest.name, "run": "files", **facts, **read_files(trial.manifest)}
    with tempfile.TemporaryDirectory(prefix="turbowan-bench-") as scratch:
        caches = {name: str(Path(scratch) / name) for name in _CACHES} if trial.first_ever else {}
        if trial.first_ever:
            yield from _records(trial, "first-ever", _process(trial, Path(scratch), 1, caches))
        yield from _records(trial, "cold", _process(trial, Path(scratch), 1 + trial.warm, caches))


def _process(trial: Trial, scratch: Path, runs: int, environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What a process says that carries out a trial, each line with "at": seconds since it was started."""
    spec = {
        "model": str(trial.folder), "device": trial.device, "request": dict(trial.request), "runs": runs,
        "image": trial.image, "target": str(scratch / "video.mp4"), "cap": trial.cap,
    }  # fmt: skip
    package = __package__ or "turbowan.bench"
    command = [sys.executable, "-m", f"{package}.pipeline_process", json.dumps(spec)]
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths, **environment}
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield {"at": time.perf_counter() - started, **json.loads(line)}
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise MachineError(f"the process of the benchmark ended with code {process.returncode}; see above")


def _records(trial: Trial, name: str, lines: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The process's first run under its name, and the later ones as "warm"."""
    said = list(lines)
    marks = {line["done"]: round(line["at"], 3) for line in said if line["done"] in ("imports", "engine")}
    runs = [line for line in said if line["done"] == "run"]
    for line in said:
        if line["done"] == "refused":
            yield {**_head(trial, "refused", []), "why": line["why"], "after_s": round(line["at"], 3), "marks_s": marks}
    if not runs:
        return
    yield {**_head(trial, name, runs[:1]), "start_to_file_s": round(runs[0]["at"], 3), "marks_s": marks}
    if runs[1:]:
        own = [line["host"].get("own", 0) for line in runs]
        growth = (own[-1] - own[1]) / own[1] if own[1] else 0.0
        host = {
            "host_own_gib": [_gib(line["host"].get("own", 0)) for line in runs],
            "host_pinned_gib": [_gib(line["host"].get("pinned", 0)) for line in runs],
            "host_growth": round(growth, 4),
        }
        yield {**_head(trial, "warm", runs[1:]), **host}


def _head(trial: Trial, name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {"bench": "pipeline", "case": trial.manifest.name, "run": name}
    if runs:
        frames, height, width = runs[0]["shape"]
        record["case"] += f" {width}x{height}x{frames}"
        record["shape"] = {"frames": frames, "height": height, "width": width}
    memory = {name: trial.request[name] for name in ("memory", "gpu_budget") if name in trial.request}
    record["case"] = " ".join([record["case"], *map(str, memory.values())])
    record |= memory | machine_facts(torch.device("cuda" if _on_gpu(trial.device) else "cpu")) | dict(trial.facts)
    if not runs:
        return record
    seconds = [run["seconds"] for run in runs]
    record |= dict(runs[0]["settings"])
    if name == "warm":
        cuts = quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else 9 * seconds
        record |= {"runs": len(runs), "ms": {f"p{share}": _ms(cuts[share // 10 - 1]) for share in (20, 50, 80)}}
    stages = {stage: round(median(run["stages"][stage] for run in runs), 4) for stage in STAGES}
    if runs[0]["file"] is None:
        stages["write"] = None  # type: ignore[assignment]
    record["seconds"] = stages
    record["file_mb"] = None if runs[0]["file"] is None else round(runs[0]["file"] / 1e6, 2)
    record["peak_gib"] = {
        "gpu": _gib(max(run["gpu"] for run in runs)),
        "gpu_by_pytorch": _gib(max(run["gpu_by_pytorch"] for run in runs)),
        "gpu_reserved": _gib(max(run["gpu_reserved"] for run in runs)),
        "host": _gib(max(run["host_peak"] for run in runs)),
    }
    record["gpu_source"], record["gpu_retries"] = runs[0]["gpu_source"], runs[-1]["gpu_retries"]
    return record


def read_files(manifest: Manifest) -> dict[str, float]:
    """Read a model's files once, in parallel, so that the system keeps them in memory: bytes and seconds."""
    started = time.perf_counter()
    spans = [(path, at) for path in manifest.files.values() if path.is_file()
             for at in range(0, path.stat().st_size, _CHUNK)]  # fmt: skip

    def read(span: tuple[Path, int]) -> int:
        with span[0].open("rb", buffering=0) as file:
            file.seek(span[1])
            return len(file.read(_CHUNK))

    with ThreadPoolExecutor(8) as pool:
        total = sum(pool.map(read, spans))
    return {"gb": round(total / 1e9, 3), "read_s": round(time.perf_counter() - started, 3)}


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _gib(size: int) -> float:
    return round(size / 2**30, 3)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)


def machine_facts(device: torch.device) -> dict[str, str]:
    """What a published number must carry: the chip, PyTorch, the commit."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True, text=True, cwd=Path(__file__).parent, check=False,
    )  # fmt: skip
    return {"gpu": gpu, "torch": torch.__version__, "commit": commit.stdout.strip() or "unknown"}
