"""Loader nodes of diffusion transformers."""

from __future__ import annotations

import logging
from typing import Any

from . import folders
from .environment import default_attention
from .inputs import combo, number

log = logging.getLogger(__name__)

OFFLOAD_MODES = ("comfy_native", "layerwise_gpu", "cpu_only")
ATTENTION_TIP = (
    "How self-attention runs. 'sla' and 'sagesla' (8-bit) look at the most important blocks only and need a file"
    " trained for it; 'original' looks at everything and suits any file."
)
TOPK = 0.1  # of all published files
TOPK_TIP = (
    "Share of key blocks that sparse attention looks at, 0..1. 0.1 for TurboDiffusion's files; the tiny models, trained"
    " for 0.8 and 0.7, take that instead of 0.1."
)
OFFLOAD_TIP = (
    "Where weights live. comfy_native: ComfyUI's memory manager decides (recommended). layerwise_gpu: they stay in"
    " host memory and each block borrows them for its turn. cpu_only: everything runs on the CPU."
)
NONE = "none"
MODEL_TIP = "A Wan transformer of any family, plain or in 8 bits. 'tiny' and its kin are inside the package."


class TurboWanModelLoader:
    """MODEL from a file: a real one, for ComfyUI's own nodes as well as for ours."""

    DESCRIPTION = "Loads a Wan 2.1 / 2.2 diffusion model, plain or quantised. What it is, is read from the file."
    CATEGORY = "loaders"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_model"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {"model_name": combo(folders.choices(folders.TRANSFORMERS), MODEL_TIP)},
            "optional": {
                "attention_type": combo(("original", "sla", "sagesla"), ATTENTION_TIP, "sla"),
                "sla_topk": number(TOPK, 0.01, 1.0, 0.01, TOPK_TIP),
                "offload_mode": combo(OFFLOAD_MODES, OFFLOAD_TIP, "comfy_native"),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str) -> bool | str:  # noqa: N802
        return folders.check(model_name, (folders.TRANSFORMERS,), "model_name")

    def load_model(
        self, model_name: str, attention_type: str = "sla", sla_topk: float = TOPK, offload_mode: str = "comfy_native"
    ) -> tuple:
        return (load(model_name, "model_name", attention_type, sla_topk, offload_mode),)


class TurboWanModelLoaderV2(TurboWanModelLoader):
    """The same under its other published name, with that name's defaults."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        inputs = super().INPUT_TYPES()
        inputs["optional"]["attention_type"] = combo(("sagesla", "sla", "original"), ATTENTION_TIP, "sagesla")
        return inputs

    def load_model(
        self,
        model_name: str,
        attention_type: str = "sagesla",
        sla_topk: float = TOPK,
        offload_mode: str = "comfy_native",
    ) -> tuple:
        return super().load_model(model_name, attention_type, sla_topk, offload_mode)


class TurboWanVideoLoader:
    """One file, or the two experts of Wan 2.2, as one MODEL."""

    DESCRIPTION = (
        "Loads a Wan model, or both experts of Wan 2.2: TurboWan Video Sampler finds the second one beside the first."
    )
    CATEGORY = "loaders"
    RETURN_TYPES = ("MODEL", "MODEL")
    RETURN_NAMES = ("model", "low_noise_model")
    OUTPUT_TOOLTIPS = ("The model, or the high-noise expert.", "The low-noise expert, or the model again.")
    FUNCTION = "load_models"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        models = folders.choices(folders.TRANSFORMERS)
        return {
            "required": {"model_name": combo(models, MODEL_TIP)},
            "optional": {
                "low_noise_model_name": combo((NONE, *models), "The low-noise expert of Wan 2.2's pair.", NONE),
                "attention_type": combo(("sagesla", "sla", "original"), ATTENTION_TIP, default_attention()),
                "sla_topk": number(TOPK, 0.01, 1.0, 0.01, TOPK_TIP),
                "offload_mode": combo(OFFLOAD_MODES, OFFLOAD_TIP, "comfy_native"),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str, low_noise_model_name: str = NONE) -> bool | str:  # noqa: N802
        found = folders.check(model_name, (folders.TRANSFORMERS,), "model_name")
        if found is not True or low_noise_model_name == NONE:
            return found
        return folders.check(low_noise_model_name, (folders.TRANSFORMERS,), "low_noise_model_name")

    def load_models(
        self,
        model_name: str,
        low_noise_model_name: str = NONE,
        attention_type: str | None = None,
        sla_topk: float = TOPK,
        offload_mode: str = "comfy_native",
    ) -> tuple:
        how = (attention_type or default_attention(), sla_topk, offload_mode)
        model = load(model_name, "model_name", *how)
        if low_noise_model_name == NONE:
            return model, model
        from .model import PAIR

        low = load(low_noise_model_name, "low_noise_model_name", *how)
        model.set_attachments(PAIR, low)
        return model, low


def load(name: str, label: str, attention: str, sla_topk: float, offload_mode: str) -> Any:
    """The MODEL of a choice. label: the input that made it, for errors."""
    path = folders.find(name, (folders.TRANSFORMERS,), label)
    from .model import load_model

    trained = folders.embedded_topk(name)
    if trained is not None and sla_topk == TOPK != trained:
        log.info("turbowan: %s takes sla_topk %g, which it was trained for, instead of %g", name, trained, TOPK)
        sla_topk = trained
    with folders.naming(label):
        return load_model(path, attention, sla_topk, offload_mode)
