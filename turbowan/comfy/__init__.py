"""ComfyUI nodes. Importing this needs neither ComfyUI nor torch; the adapters beside it do, and load at first use."""

from __future__ import annotations

from .load_model import TurboWanModelLoader, TurboWanModelLoaderV2
from .load_text_encoder import TurboWanTextEncoderLoader
from .load_vae import TurboWanVAELoader
from .save_video import TurboDiffusionSaveVideo
from .sigmas import TurboWanSigmas

NODE_CLASS_MAPPINGS = {
    "TurboWanModelLoader": TurboWanModelLoader,
    "TurboWanModelLoaderV2": TurboWanModelLoaderV2,
    "TurboWanVAELoader": TurboWanVAELoader,
    "TurboWanTextEncoderLoader": TurboWanTextEncoderLoader,
    "TurboWanSigmas": TurboWanSigmas,
    "TurboDiffusionSaveVideo": TurboDiffusionSaveVideo,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TurboWanModelLoader": "TurboWan Model Loader (Quantized)",
    "TurboWanModelLoaderV2": "TurboWan Model Loader (Official)",
    "TurboWanVAELoader": "TurboWan VAE Loader",
    "TurboWanTextEncoderLoader": "TurboWan Text Encoder Loader",
    "TurboWanSigmas": "TurboWan Sigmas",
    "TurboDiffusionSaveVideo": "Save Video (TurboDiffusion)",
}
