"""ComfyUI nodes. Importing this needs neither ComfyUI nor torch; the adapters beside it do, and load at first use."""

from __future__ import annotations

from pathlib import Path

from .condition import TurboWanI2VPrepare, TurboWanSampler
from .image_to_video import TurboDiffusionI2V
from .keys import free
from .load_model import TurboWanModelLoader, TurboWanModelLoaderV2, TurboWanVideoLoader
from .load_text_encoder import TurboWanTextEncoderLoader
from .load_vae import TurboWanVAELoader
from .sample import TurboDiffusionI2VSampler, TurboWanDualExpertSampler, TurboWanVideoSampler
from .save_video import TurboDiffusionSaveVideo
from .sigmas import TurboWanSigmas

# key -> node and the name it is shown under; keys and order of inputs stand in saved graphs and never change
_NODES = {
    "TurboWanModelLoader": (TurboWanModelLoader, "TurboWan Model Loader (Quantized)"),
    "TurboWanModelLoaderV2": (TurboWanModelLoaderV2, "TurboWan Model Loader (Official)"),
    "TurboWanVAELoader": (TurboWanVAELoader, "TurboWan VAE Loader"),
    "TurboWanTextEncoderLoader": (TurboWanTextEncoderLoader, "TurboWan Text Encoder Loader"),
    "TurboWanSampler": (TurboWanSampler, "TurboWan I2V Sampler"),
    "TurboWanI2VPrepare": (TurboWanI2VPrepare, "TurboWan I2V Prepare"),
    "TurboDiffusionI2VSampler": (TurboDiffusionI2VSampler, "TurboDiffusion I2V Sampler"),
    "TurboWanDualExpertSampler": (TurboWanDualExpertSampler, "TurboWan Dual-Expert Sampler"),
    "TurboDiffusionI2V": (TurboDiffusionI2V, "TurboDiffusion I2V (Official Wrapper)"),
    "TurboWanVideoLoader": (TurboWanVideoLoader, "TurboWan Video Loader"),
    "TurboWanVideoSampler": (TurboWanVideoSampler, "TurboWan Video Sampler"),
    "TurboWanSigmas": (TurboWanSigmas, "TurboWan Sigmas"),
    "TurboDiffusionSaveVideo": (TurboDiffusionSaveVideo, "Save Video (TurboDiffusion)"),
    "WanVideoLoader": (TurboWanVideoLoader, "TurboWan Video Loader"),
    "WanVideoSampler": (TurboWanVideoSampler, "TurboWan Video Sampler"),
}
_FREE = free(_NODES, aliases=("WanVideoLoader", "WanVideoSampler"))
NODE_CLASS_MAPPINGS = {key: node for key, (node, _) in _FREE.items()}
NODE_DISPLAY_NAME_MAPPINGS = {key: name for key, (_, name) in _FREE.items()}
WEB_DIRECTORY = str(Path(__file__).parent / "web")  # scripts for the page
