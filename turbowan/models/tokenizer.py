"""Prompts to token ids, as umT5 was trained to read them."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import ftfy
import torch
from torch import Tensor

TEXT_LENGTH = 512
PAD, END = 0, 1


def clean(prompt: str) -> str:
    """Mend broken characters, undo HTML escapes (twice, as Wan does), fold white space. Case is kept."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


class Tokenizer:
    """Cleans, splits, ends with </s>, truncates and pads to 512 ids.

    Args:
        split: a cleaned prompt to ids, without the end token.
    """

    def __init__(self, split: Callable[[str], Sequence[int]]) -> None:
        self._split = split

    @classmethod
    def from_sentencepiece(cls, model: bytes) -> Tokenizer:
        """From the bytes of a `spiece.model`, such as ComfyUI's text encoder files carry."""
        import sentencepiece

        return cls(sentencepiece.SentencePieceProcessor(model_proto=model).encode)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From a `transformers` tokenizer folder (`tokenizer.json` or `spiece.model`)."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return cls(lambda text: tokenizer(text, add_special_tokens=False).input_ids)

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B prompts to ids int64 [B, 512] and mask int64 [B, 512]."""
        ids = torch.full((len(prompts), TEXT_LENGTH), PAD, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            tokens = [*self._split(clean(prompt))[: TEXT_LENGTH - 1], END]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids, mask
