"""VAE: ComfyUI's own class, with our network inside."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor

from ..checkpoints.load import load_vae
from ..models.vae import LATENT_CHANNELS, SPATIAL_FACTOR, TEMPORAL_FACTOR, CausalConv3d, WanVAE, latent_frames

WIDTH = 96  # of Wan 2.1's, for which ComfyUI's memory figures below were found
ENCODE_BYTES, DECODE_BYTES = 6000, 7000  # per pixel and byte of a number


class Network(WanVAE):
    """Our VAE, called the way ComfyUI calls its own: latents are not normalised, and an interruption stops it within a
    convolution (within a chunk on a GPU)."""

    def __init__(self, vae: WanVAE) -> None:
        with torch.device("meta"):
            super().__init__(vae.dim)
        for name, child in vae.named_children():
            setattr(self, name, child)
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                module.register_forward_pre_hook(_stop_if_interrupted)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        like = self.conv1.weight
        shape = (LATENT_CHANNELS, 1, 1, 1)
        return like.new_zeros(shape), like.new_ones(shape)

    def encode(self, video: Tensor) -> Tensor:
        """As `WanVAE.encode`; frames past the last whole group of four are left out, and a clip whose frames after the
        first are all 0.0 takes the short way."""
        frames = TEMPORAL_FACTOR * (latent_frames(video.shape[2]) - 1) + 1
        video = video[:, :, :frames]
        if frames > 1 and not video[:, :, 1:].any():
            return self.encode_first_frame(video[:, :, 0], frames)
        return super().encode(video)

    def decode(self, latent: Tensor) -> Tensor:
        chunks = []
        for chunk in self.decode_stream(latent):
            _stop_if_interrupted()
            chunks.append(chunk)
        return torch.cat(chunks, dim=2)


def _stop_if_interrupted(*_: object) -> None:
    if not torch.compiler.is_compiling():  # what is compiled is to stay in one piece
        comfy.model_management.throw_exception_if_processing_interrupted()


class VAE(comfy.sd.VAE):
    """A Wan 2.1 VAE of any width.

    Raises:
        CheckpointError: the file cannot serve.
    """

    def __init__(self, path: Path) -> None:
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)  # "No VAE weights detected": they come below
        try:
            super().__init__(sd={})
        finally:
            logging.disable(level)
        self.device = comfy.model_management.vae_device()
        self.working_dtypes = [torch.bfloat16, torch.float32]
        self.vae_dtype = comfy.model_management.vae_dtype(self.device, self.working_dtypes)
        self.output_device = comfy.model_management.intermediate_device()
        self.first_stage_model = Network(load_vae(path, "cpu", self.vae_dtype)).eval()
        self.latent_dim, self.latent_channels = 3, LATENT_CHANNELS
        factors = (TEMPORAL_FACTOR, SPATIAL_FACTOR, SPATIAL_FACTOR)
        self.upscale_ratio = (lambda t: max(0, TEMPORAL_FACTOR * t - 3), SPATIAL_FACTOR, SPATIAL_FACTOR)
        self.downscale_ratio = (lambda t: max(0, (t + 3) // TEMPORAL_FACTOR), SPATIAL_FACTOR, SPATIAL_FACTOR)
        self.upscale_index_formula = self.downscale_index_formula = factors
        share = self.first_stage_model.dim / WIDTH
        self.memory_used_encode = lambda shape, dtype: share * ENCODE_BYTES * shape[3] * shape[4] * dtype.itemsize
        self.memory_used_decode = lambda shape, dtype: share * DECODE_BYTES * shape[3] * shape[4] * 64 * dtype.itemsize
        self.disable_offload = True  # small, and wanted whole
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model,
            load_device=self.device,
            offload_device=comfy.model_management.vae_offload_device(),
        )

    # names that TurboDiffusion's wrapper gave its VAE
    spatial_compression_factor = SPATIAL_FACTOR
    temporal_compression_factor = TEMPORAL_FACTOR
    latent_ch = LATENT_CHANNELS

    @staticmethod
    def get_latent_num_frames(num_frames: int) -> int:
        return latent_frames(num_frames)
