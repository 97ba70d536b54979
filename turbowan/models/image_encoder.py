"""The CLIP vision tower whose tokens condition Wan 2.1 image-to-video, through `transformers`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ImageEncoder(nn.Module):
    """CLIP ViT (ViT-H/14 in Wan 2.1): the hidden states before the last layer.

    Args:
        config: sizes, as `CLIPVisionConfig` names them.
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.model = CLIPVisionModel(config)

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1 -> tokens [B, 257, 1280] (for ViT-H/14).

        The picture is resized to the tower's square without cropping, bicubic, as Wan does.
        """
        size = int(self.model.config.image_size)  # type: ignore[arg-type]
        image = F.interpolate(image.float(), (size, size), mode="bicubic", align_corners=False) * 0.5 + 0.5
        mean, std = (torch.tensor(x, device=image.device).view(1, 3, 1, 1) for x in (MEAN, STD))
        weight_dtype = next(self.model.parameters()).dtype
        states = self.model(((image - mean) / std).to(weight_dtype), output_hidden_states=True).hidden_states
        return states[-2]
