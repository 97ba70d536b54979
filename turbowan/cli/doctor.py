"""`turbowan doctor`: what this machine has, what each operation would use on it and why, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..ops.registry import Choice


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    gpu_budget: Annotated[str | None, typer.Option(help="What fits in so much, such as 12GB.")] = None,
) -> None:
    """Look at this machine. Exit code 0: everything needed works; 2: something is missing, the last lines say what."""
    report = examine(gpu_budget)
    if as_json:
        print(json.dumps(report))
    else:
        _print_report(report)
    raise typer.Exit(2 if report["problems"] else 0)


def examine(gpu_budget: str | None = None) -> dict[str, Any]:
    """All facts, as `--json` prints them. problems: what must be mended; notes: what could be better.

    Args:
        gpu_budget: models are planned for as much memory of a GPU, which need not be there; by default for the first
            GPU, if there is one.
    """
    from .. import __version__
    from ..machine import REQUIRED, host, package_problems, package_versions

    packages = package_versions()
    report: dict[str, Any] = {"turbowan": __version__, **host(), "packages": packages}
    report |= {"problems": package_problems(packages), "notes": []}
    if all(packages[name] for name in REQUIRED):
        _examine_torch(report)
        _examine_parts(report)
        _examine_memory(report, gpu_budget)
    return report


def _examine_memory(report: dict[str, Any], gpu_budget: str | None) -> None:
    """By model and size, the plan or why there is none."""
    from ..memory.catalog import plan_common
    from ..memory.room import UNKNOWN_HOST, Room
    from ..request import parse_bytes

    gpu = report["devices"][0]["memory_free"] if report["devices"] else None
    budget = None if gpu_budget is None else parse_bytes(gpu_budget)
    if gpu is None and budget is None:
        return
    room = Room(gpu or budget or 0, report["memory_free"] or UNKNOWN_HOST, budget=budget)
    report["plans"] = plan_common(room)


def _examine_torch(report: dict[str, Any]) -> None:
    import torch

    from ..machine import cuda_devices, torch_note
    from ..ops import Facts, compute_dtype, explain

    report["torch_cuda"] = torch.version.cuda or torch.version.hip
    report["torch_threads"] = torch.get_num_threads()
    devices = report["devices"] = cuda_devices()
    if not devices and Path("/dev/nvidia0").exists():
        reason = "it is built without CUDA" if report["torch_cuda"] is None else "the driver may be too old for it"
        report["notes"].append(f"there is an NVIDIA GPU, but PyTorch does not see it: {reason}")
    facts = {"cpu float32": Facts("cpu", torch.float32)}  # what `precision="auto"` computes with
    for device in devices:
        major, minor = device["capability"]
        dtype = compute_dtype((major, minor))
        place = f"cuda {major}.{minor} {str(dtype).removeprefix('torch.')}"
        facts[place] = Facts("cuda", dtype, capability=(major, minor))
    operations: dict[str, dict[str, Any]] = {}
    for place, here in facts.items():
        for name, choice in explain(here).items():
            operations.setdefault(name, {})[place] = {
                "uses": choice.implementation.name, "why": _why(choice), "others": choice.others(),
            }  # fmt: skip
    report["operations"] = operations
    report["linears"] = {place: _linears(here.capability) for place, here in facts.items()}
    note = torch_note(report["packages"]["torch"], bool(devices))
    report["notes"] += [note] if note else []


def _linears(capability: tuple[int, int] | None) -> dict[str, dict[str, Any]]:
    """By the format of a file, what `--precision auto` runs its linear layers in, and why."""
    from ..ops import choose_format
    from ..ops.rows import FORMATS

    choices = {name: choose_format(capability, name) for name in FORMATS}
    return {n: {"uses": c.format, "why": c.why, "measured": c.measured} for n, c in choices.items()}


def _why(choice: Choice) -> str:
    if choice.forced:
        return "forced"
    if choice.passed_over:
        return "highest priority of those that can run"
    return "the only one that can run" if choice.refused else "the only one there is"


def _examine_parts(report: dict[str, Any]) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    from ..checkpoints.find import default_model, embedded_models
    from ..checkpoints.tokenizer import HUB_NAME, in_hub_cache
    from ..engine import Engine
    from ..errors import TurbowanError
    from ..machine import free_disk

    report["hub_cache"], report["hub_cache_free"] = HF_HUB_CACHE, free_disk(Path(HF_HUB_CACHE))
    report["encoders"] = {name: _encoder_problem(suffix) for name, suffix in (("H.264", ".mp4"), ("VP9", ".webm"))}
    for name, problem in report["encoders"].items():
        if problem is not None:
            line = f"the video encoder {name} does not work ({problem}); reinstall it: pip install --force-reinstall av"
            report["problems" if name == "H.264" else "notes"].append(line)
    report["embedded_models"] = {}
    for name in embedded_models():
        try:
            files = Engine.load(name, device="cpu").manifest.files
            report["embedded_models"][name] = {role: str(path) for role, path in files.items()}
        except TurbowanError as error:
            report["embedded_models"][name] = None
            report["problems"].append(f"the embedded model {name} is not whole ({error}); install turbowan again")
    tiny = report["embedded_models"].get(default_model(has_image=False))
    report["tokenizers"] = {"tiny": tiny["tokenizer"] if tiny else None, HUB_NAME: None}
    cached = in_hub_cache()
    if cached is not None:
        report["tokenizers"][HUB_NAME] = str(cached)


def _encoder_problem(suffix: str) -> str | None:
    """None if a video of this kind can be written here, found out by writing one; else the reason."""
    from tempfile import TemporaryDirectory

    import numpy as np

    from ..media.video import write_video

    frames = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
    try:
        with TemporaryDirectory() as folder:
            write_video(Path(folder) / f"probe{suffix}", frames, fps=16)
    except Exception as error:  # whatever a build of the libraries may lack
        return " ".join(str(error).split())[:120] or type(error).__name__
    return None


def _print_report(report: dict[str, Any]) -> None:
    from ..machine import OPTIONAL, REQUIRED, size_text
    from .table import print_table

    print_table("Machine", _machine_rows(report))
    needs = {name: f"needs >= {oldest}" for name, oldest in REQUIRED.items()}
    uses = {name: f"optional: {use}" for name, use in OPTIONAL.items()}
    packages = [(name, version or "missing", (needs | uses)[name]) for name, version in report["packages"].items()]
    print_table("Packages", packages)
    if "operations" in report:
        operations = [
            (name, place, choice["uses"], choice["why"], "; ".join(f"{o}: {r}" for o, r in choice["others"].items()))
            for name, places in report["operations"].items()
            for place, choice in places.items()
        ]
        print_table("Operations", operations, ("operation", "on", "uses", "why", "not chosen"))
    if "linears" in report:
        from ..ops.formats import BUDGET

        linears = [
            (name, place, choice["uses"], choice["why"])
            for place, choices in report["linears"].items()
            for name, choice in choices.items()
        ]
        title = f"Linear layers of a file (--precision auto; a change may add an error of {BUDGET:g})"
        print_table(title, linears, ("file's format", "on", "runs in", "why"))
    if "plans" in report:
        rows = [
            (plan["model"], plan["size"], size_text(plan["peak"]) if plan["peak"] else "", plan["summary"])
            for plan in report["plans"]
        ]
        print_table("Memory: common models, 81 frames, planned", rows, ("model", "size", "peak", "how"))
    for note in report["notes"]:
        print(f"note: {note}")
    for problem in report["problems"]:
        print(f"problem: {problem}")
    if not report["problems"]:
        print("everything needed works")


def _machine_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    from ..machine import size_text

    def memory(of: dict[str, Any]) -> str:
        total, free = (size_text(of[key]) if of[key] is not None else "?" for key in ("memory", "memory_free"))
        return f"{total}, {free} free"

    rows = [
        ("turbowan", report["turbowan"]),
        ("python", f"{report['python']} ({report['executable']})"),
        ("platform", report["platform"]),
        ("CPU", f"{report['cpu_threads']} threads"),
        ("memory", memory(report)),
    ]
    if "devices" in report:
        rows += [
            (f"GPU {i}", f"{gpu['name']}, capability {'.'.join(map(str, gpu['capability']))}, {memory(gpu)}")
            for i, gpu in enumerate(report["devices"])
        ] or [("GPU", "none that PyTorch sees")]
        built = f"for {report['torch_cuda']}" if report["torch_cuda"] else "for the CPU alone"
        rows += [("PyTorch", f"{report['packages']['torch']} {built}, {report['torch_threads']} CPU threads")]
    if "encoders" in report:
        found = [f"{name}: {problem or 'works'}" for name, problem in report["encoders"].items()]
        rows += [
            ("video", ", ".join(found)),
            ("embedded models", ", ".join(n if f else f"{n} not whole" for n, f in report["embedded_models"].items())),
            *((f"tokenizer {name}", where or "not here") for name, where in report["tokenizers"].items()),
            ("hub cache", f"{report['hub_cache']}, {size_text(report['hub_cache_free'])} free"),
        ]
    return rows
