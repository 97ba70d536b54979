"""Nodes for the tests only: a condition from a file, so that a run needs no text encoder of the right width."""

from __future__ import annotations

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


NODE_CLASS_MAPPINGS = {"ProbeConditioning": ProbeConditioning}
