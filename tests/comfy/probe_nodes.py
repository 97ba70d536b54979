"""Nodes for the tests only: conditions from a file, so that a run needs no text encoder of the right width, a replaced
block, and records of what a model was given and gave back, of its times, and of the GPU's memory."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import comfy.model_management
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import load_file, save_file


class ProbeConditioning:
    CATEGORY = "tests"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "read"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {"required": {"file": ("STRING", {}), "key": ("STRING", {"default": "context"})}}

    def read(self, file: str, key: str) -> tuple:
        tensors = load_file(folder_paths.get_annotated_filepath(file))
        text = tensors[key].float()
        if "known" in tensors:  # as another pack's nodes put it
            return ([[{"crossattn_emb": text, "y_B_C_T_H_W": tensors["known"]}, {}]],)
        values: dict[str, Any] = {"pooled_output": None}
        if "clip_vision" in tensors:
            values["clip_vision_output"] = SimpleNamespace(penultimate_hidden_states=tensors["clip_vision"])
        if "reference" in tensors:
            values["reference_latents"] = [tensors["reference"]]
        return ([[text.reshape(1, *text.shape[-2:]), values]],)


class ProbeBlock:
    """Replaces the second block, by itself or by nothing."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {"required": {"model": ("MODEL",), "skip": ("BOOLEAN", {"default": False})}}

    def patch(self, model: Any, skip: bool) -> tuple:
        patched = model.clone()

        def block(args: dict, extra: dict) -> dict:
            return {"img": args["img"]} if skip else extra["original_block"](args)

        patched.set_model_patch_replace(block, "dit", "double_block", 1)
        return (patched,)


class ProbeCalls:
    """Keeps every call of the network as a file, output/calls/NAME-00.safetensors and so on."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "record"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {"required": {"model": ("MODEL",), "name": ("STRING", {})}}

    def record(self, model: Any, name: str) -> tuple:
        patched = model.clone()
        folder = Path(folder_paths.get_output_directory()) / "calls"
        folder.mkdir(exist_ok=True)

        def call(executor: Any, x: Any, timestep: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
            out = executor(x, timestep, context, *args, **kwargs)
            path = folder / f"{name}-{len(list(folder.glob(f'{name}-*'))):02}.safetensors"
            given = {"x": x, "timestep": timestep, "context": context, "out": out}
            save_file({key: value.contiguous() for key, value in given.items()}, path)
            return out

        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "probe", call)
        return (patched,)


TIMES: dict[str, list[dict[str, float]]] = {}


class ProbeTimes:
    """Notes milliseconds and bytes of GPU memory (before, and at most) of every call of the network."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "record"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {"required": {"model": ("MODEL",), "name": ("STRING", {})}}

    def record(self, model: Any, name: str) -> tuple:
        patched = model.clone()

        def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
            _synchronize()
            before, started = _memory(), time.perf_counter()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            out = executor(*args, **kwargs)
            _synchronize()
            ms = 1000 * (time.perf_counter() - started)
            TIMES.setdefault(name, []).append({"ms": ms, "before": before["allocated"], "peak": _memory()["peak"]})
            return out

        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "times", call)
        return (patched,)


class ProbeKeep:
    """Keeps frames (uint8) or a latent as output/kept/NAME.safetensors; shows the times noted under that name and the
    GPU's memory, its peak since the last of these nodes."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "keep"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {
            "required": {"name": ("STRING", {})},
            "optional": {"frames": ("IMAGE",), "samples": ("LATENT",)},
        }

    def keep(self, name: str, frames: Any = None, samples: Any = None) -> dict:
        kept = {}
        if frames is not None:
            kept["frames"] = (frames.cpu() * 255 + 0.5).to(torch.uint8).contiguous()
        if samples is not None:
            kept["samples"] = samples["samples"].cpu().contiguous()
        folder = Path(folder_paths.get_output_directory()) / "kept"
        folder.mkdir(exist_ok=True)
        save_file(kept, folder / f"{name}.safetensors")
        memory = _memory()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return {"ui": {"calls": TIMES.pop(name, []), "memory": [memory]}}


class ProbeCard:
    """Makes the GPU one of so many GiB, by taking the rest of its memory; 0 gives it back."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "take"
    OUTPUT_NODE = True
    taken: ClassVar[list[torch.Tensor]] = []

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {"required": {"gib": ("FLOAT", {"min": 0, "max": 1000})}}

    def take(self, gib: float) -> dict:
        self.taken.clear()
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache(True)
        if gib and torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            left = max(0, gib * 2**30 - (total - free))
            self.taken.append(torch.empty(int(free - left), dtype=torch.uint8, device="cuda"))
        return {"ui": {"memory": [_memory()]}}

    @classmethod
    def IS_CHANGED(cls, gib: float) -> float:  # noqa: N802
        return float("nan")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _memory() -> dict[str, float]:
    """Bytes."""
    if not torch.cuda.is_available():
        return dict.fromkeys(("allocated", "peak", "reserved", "free", "total"), 0)
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.memory_reserved(), "free": free, "total": total,
    }  # fmt: skip


PROBES = (ProbeConditioning, ProbeBlock, ProbeCalls, ProbeTimes, ProbeKeep, ProbeCard)
NODE_CLASS_MAPPINGS = {probe.__name__: probe for probe in PROBES}
