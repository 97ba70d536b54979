"""Nodes for the tests only: a condition from a file, so that a run needs no text encoder of the right width."""

from __future__ import annotations

from typing import Any

import folder_paths
from safetensors.torch import load_file


class ProbeConditioning:
    CATEGORY = "tests"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "read"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {"required": {"file": ("STRING", {}), "key": ("STRING", {"default": "context"})}}

    def read(self, file: str, key: str) -> tuple:
        text = load_file(folder_paths.get_annotated_filepath(file))[key].float()
        return ([[text.reshape(1, *text.shape[-2:]), {"pooled_output": None}]],)


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


NODE_CLASS_MAPPINGS = {"ProbeConditioning": ProbeConditioning, "ProbeBlock": ProbeBlock}
