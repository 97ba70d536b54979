"""Nodes for the tests only: conditions from a file, so that a run needs no text encoder of the right width, a replaced
block, and a record of what a model was given and gave back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import folder_paths
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


NODE_CLASS_MAPPINGS = {"ProbeConditioning": ProbeConditioning, "ProbeBlock": ProbeBlock, "ProbeCalls": ProbeCalls}
