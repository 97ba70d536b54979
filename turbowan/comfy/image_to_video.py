"""The node that does everything: files, prompt and picture to frames."""

from __future__ import annotations

from typing import Any

from . import folders, load_model, load_vae
from .checks import check_prompt
from .condition import LENGTH_TIP, NEGATIVE, NEGATIVE_TIP, POSITIVE, prepare
from .inputs import combo, link, number, seed, switch, text, whole
from .load_model import ATTENTION_TIP, OFFLOAD_MODES, OFFLOAD_TIP, TOPK, TOPK_TIP
from .sample import BOUNDARY_TIP, HIGH_TIP, LOW_TIP, ODE_TIP, SIGMA_TIP, STEPS, STEPS_TIP, check_experts, decode, sample


class TurboDiffusionI2V:
    """Loaders, preparation, sampling and decoding in one."""

    DESCRIPTION = "A prompt and a start picture to frames, loading all files itself, each right before it is needed."
    CATEGORY = "video/turbodiffusion"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "generate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        models = folders.choices(folders.TRANSFORMERS)
        return {
            "required": {
                "high_noise_model": combo(models, HIGH_TIP),
                "low_noise_model": combo(models, LOW_TIP),
                "vae": combo(folders.vae_choices(), "The Wan 2.1 VAE."),
                "text_encoder": combo(folders.choices(folders.TEXT_ENCODERS), "The umT5 text encoder."),
                "start_image": link("IMAGE", "The video's first frame; stretched to the size."),
                "prompt": text(POSITIVE, "What happens in the video.", multiline=True),
                "negative_prompt": text(NEGATIVE, NEGATIVE_TIP, multiline=True),
                "num_frames": whole(121, 5, 241, LENGTH_TIP, 4),
                "num_steps": combo(STEPS, STEPS_TIP, 4),
                "boundary": number(0.9, 0.0, 1.0, 0.001, BOUNDARY_TIP),
                "seed": seed(),
                "use_ode": switch(True, ODE_TIP),
            },
            "optional": {
                "attention_type": combo(("sagesla", "sla", "original"), ATTENTION_TIP, "sagesla"),
                "sla_topk": number(TOPK, 0.01, 1.0, 0.01, TOPK_TIP),
                "width": whole(1280, 64, 2048, "Pixels, a multiple of 16.", 16),
                "height": whole(720, 64, 2048, "Pixels, a multiple of 16.", 16),
                "sigma_max": number(200.0, 1.0, 1000.0, 0.1, SIGMA_TIP),
                "offload_mode": combo(OFFLOAD_MODES, OFFLOAD_TIP, "comfy_native"),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(  # noqa: N802
        cls, high_noise_model: str, low_noise_model: str, vae: str, text_encoder: str
    ) -> bool | str:
        chosen = (
            (high_noise_model, (folders.TRANSFORMERS,), "high_noise_model"),
            (low_noise_model, (folders.TRANSFORMERS,), "low_noise_model"),
            (vae, load_vae.KINDS, "vae"),
            (text_encoder, (folders.TEXT_ENCODERS,), "text_encoder"),
        )
        return next((found for found in (folders.check(*each) for each in chosen) if found is not True), True)

    def generate(
        self,
        high_noise_model: str,
        low_noise_model: str,
        vae: str,
        text_encoder: str,
        start_image: Any,
        prompt: str,
        negative_prompt: str,
        num_frames: int,
        num_steps: int,
        boundary: float,
        seed: int,
        use_ode: bool,
        attention_type: str = "sagesla",
        sla_topk: float = TOPK,
        width: int = 1280,
        height: int = 720,
        sigma_max: float = 200.0,
        offload_mode: str = "comfy_native",
    ) -> tuple:
        check_prompt(prompt, "prompt")
        coder = load_vae.load(vae, "vae")
        told, latent = prepare(text_encoder, coder, start_image, prompt, width, height, num_frames, "disabled")
        names = {"high_noise_model": high_noise_model, "low_noise_model": low_noise_model}
        how = (attention_type, sla_topk, offload_mode)
        models = {label: load_model.load(name, label, *how) for label, name in names.items()}
        check_experts(models, told, None)
        shape = tuple(latent["samples"].shape)
        samples = sample(models, told, shape, num_steps, boundary, sigma_max, seed, use_ode)
        del models
        return (decode(coder, samples),)
