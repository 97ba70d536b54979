"""A SentencePiece tokenizer for the procedural world's captions; any other text falls back to bytes."""

from __future__ import annotations

import io
import random
from pathlib import Path

import sentencepiece
import torch

from ..checkpoints.files import replacing
from ..world.captions import caption
from ..world.scenes import draw_scenes

VOCABULARY = 512


def train_tokenizer(path: Path, captions: int = 20_000, seed: int = 0) -> None:
    """Write `spiece.model` with umT5's special ids: pad 0, end 1, unknown 2, no start. Case is folded."""
    scenes = draw_scenes(captions, torch.Generator().manual_seed(seed), camera_share=0.3)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(caption(scenes, random.Random(seed))),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    with replacing(path) as partial:
        partial.write_bytes(model.getvalue())
