"""CLIP: ComfyUI's own class, with our umT5 encoder and tokenizer inside."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor, nn

from ..checkpoints.load import load_text_encoder
from ..checkpoints.tokenizer import find_tokenizer
from ..models.text_encoder import TextEncoder
from ..models.tokenizer import TEXT_LENGTH, Tokenizer
from .weights import Patcher, adopt

KEY = "umt5xxl"  # under which ComfyUI's Wan tokens go


class Words:
    """The tokenizer: the text as it stands, without ComfyUI's (weights), as Wan was trained."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> dict[str, list]:
        ids, mask = self._tokenizer([text])
        pairs = [(int(i), 1.0) for i in ids[0][: int(mask.sum())]]
        return {KEY: [[(*pair, n + 1) for n, pair in enumerate(pairs)] if return_word_ids else pairs]}

    def untokenize(self, pairs: list) -> list:
        return [(pair, "") for pair in pairs]

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class Encoder(nn.Module):
    """The encoder: tokens to [1, 512, D], rows past the prompt zero."""

    device: torch.device  # where the weights are; ComfyUI keeps it

    def __init__(self, encoder: TextEncoder, dtype: torch.dtype) -> None:
        super().__init__()
        self._encoder = (encoder,)  # kept out of the names, which are those that LoRA files for ComfyUI have
        self.umt5xxl = nn.ModuleDict({"transformer": encoder.model})
        self.dtypes = {dtype}
        stack = encoder.model.encoder
        adopt(encoder, list(stack.block), comfy.model_management.throw_exception_if_processing_interrupted)

    def set_clip_options(self, options: dict) -> None:
        """ComfyUI's choice of a layer and the like: umT5 for Wan has none."""

    def reset_clip_options(self) -> None:
        """See `set_clip_options`."""

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, None]:
        ids = torch.tensor([[pair[0] for pair in row] for row in tokens[KEY]], device=self.device)
        text = self._encoder[0](ids, torch.ones_like(ids))
        padded = torch.nn.functional.pad(text, (0, 0, 0, TEXT_LENGTH - text.shape[1]))
        return padded.float().to(comfy.model_management.intermediate_device()), None


def load_clip(path: Path) -> comfy.sd.CLIP:
    """The CLIP of a file, in any layout.

    Raises:
        CheckpointError: the file cannot serve, or no tokenizer is found for it.
    """
    device = comfy.model_management.text_encoder_device()
    tokenizer = Words(find_tokenizer(path))
    dtype = torch.float32
    if device.type != "cpu" and comfy.model_management.should_use_bf16(device):
        dtype = torch.bfloat16
    encoder = Encoder(load_text_encoder(path, "cpu", dtype), dtype)
    target = SimpleNamespace(params={}, clip=lambda **_: encoder, tokenizer=lambda **_: tokenizer)
    # an initial device that is none keeps it from loading now
    clip = comfy.sd.CLIP(target, model_options={"dtype": dtype, "initial_device": torch.device("meta")})
    made = clip.patcher
    clip.patcher = Patcher(encoder, load_device=made.load_device, offload_device=made.offload_device)
    clip.patcher.is_clip, clip.patcher.hook_mode = True, made.hook_mode
    return clip
