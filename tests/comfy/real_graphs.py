"""Graphs in ComfyUI's API form, as the cases run and change them."""

from __future__ import annotations

Graph = dict[str, dict]
RECORDED_SHAPE = (1, 16, 5, 16, 24)  # of the recorded case's latent


def node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


def changed(graph: Graph, key: str, **inputs: object) -> Graph:
    """The graph with some inputs of one node set."""
    return {**graph, key: {**graph[key], "inputs": {**graph[key]["inputs"], **inputs}}}


def text_to_video(seed: int, prompt: str = "a red circle moves right on a blue background") -> Graph:
    return {
        "model": node("TurboWanModelLoader", model_name="tiny", attention_type="sla", sla_topk=0.8),
        "clip": node("TurboWanTextEncoderLoader", text_encoder="tiny"),
        "text": node("CLIPTextEncode", clip=["clip", 0], text=prompt),
        "grid": node("TurboWanSigmas", num_steps=4, sigma_max=80.0, boundary=0.9),
        "sampler": node("KSamplerSelect", sampler_name="lcm"),
        "empty": node("EmptyHunyuanLatentVideo", width=128, height=96, length=9, batch_size=1),
        "sample": sample_custom(seed, "grid"),
        "vae": node("TurboWanVAELoader", vae_name="tiny"),
        "frames": node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "save": node("TurboDiffusionSaveVideo", frames=["frames", 0], filename_prefix="t2v", fps=16, format="mp4"),
    }


def sample_custom(seed: int, grid: str, text: str = "text") -> dict:
    return node(
        "SamplerCustom", model=["model", 0], add_noise=True, noise_seed=seed, cfg=1.0, positive=[text, 0],
        negative=[text, 0], sampler=["sampler", 0], sigmas=[grid, 0], latent_image=["empty", 0],
    )  # fmt: skip


def recorded(seed: int, model: str, attention: str, sampler: str, steps: int = 4) -> Graph:
    """The recorded transformer by ComfyUI's own sampling nodes; the latent is kept."""
    height, width = (8 * size for size in RECORDED_SHAPE[3:])
    return {
        "model": node("TurboWanModelLoader", model_name=model, attention_type=attention, sla_topk=0.25),
        "text": node("ProbeConditioning", file="t2v-tiny.io.safetensors", key="context"),
        "grid": node("TurboWanSigmas", num_steps=steps, sigma_max=80.0, boundary=0.9),
        "sampler": node("KSamplerSelect", sampler_name=sampler),
        "empty": node("EmptyHunyuanLatentVideo", width=width, height=height, length=17, batch_size=1),
        "sample": sample_custom(seed, "grid"),
        "keep": node("SaveLatent", samples=["sample", 0], filename_prefix="latents/kept"),
    }


def image_to_video(seed: int, **changes: object) -> Graph:
    inputs = {
        "num_frames": 9, "num_steps": 4, "resolution": "custom", "aspect_ratio": "16:9", "boundary": 0.9,
        "sigma_max": 200.0, "seed": seed, "use_ode": False, "width": 128, "height": 96, **changes,
    }  # fmt: skip
    return {
        "high": node("TurboWanModelLoader", model_name="tiny-i2v-high", attention_type="sla", sla_topk=0.7),
        "low": node("TurboWanModelLoader", model_name="tiny-i2v-low", attention_type="sla", sla_topk=0.7),
        "clip": node("TurboWanTextEncoderLoader", text_encoder="tiny"),
        "text": node("CLIPTextEncode", clip=["clip", 0], text="the red circle moves right"),
        "vae": node("TurboWanVAELoader", vae_name="tiny"),
        "image": node("LoadImage", image="start.png"),
        "sample": node(
            "TurboDiffusionI2VSampler", high_noise_model=["high", 0], low_noise_model=["low", 0],
            conditioning=["text", 0], vae=["vae", 0], image=["image", 0], **inputs,
        ),
        "save": node("TurboDiffusionSaveVideo", frames=["sample", 0], filename_prefix="i2v", fps=16, format="webm"),
    }  # fmt: skip
