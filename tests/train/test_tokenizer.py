"""The tokenizer stage makes the embedded tokenizer again."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

from turbowan.errors import CheckpointError
from turbowan.train.tokenizer import VOCABULARY, train_tokenizer


def test_training_is_deterministic_and_gives_the_embedded_one(tmp_path: Path, tiny: Path) -> None:
    train_tokenizer(tmp_path / "new" / "spiece.model")
    train_tokenizer(tmp_path / "again.model")
    made = (tmp_path / "new" / "spiece.model").read_bytes()
    assert made == (tmp_path / "again.model").read_bytes()
    new, embedded = (
        sentencepiece.SentencePieceProcessor(model_proto=data)
        for data in (made, (tiny / "tokenizer" / "spiece.model").read_bytes())
    )
    pieces = [[s.id_to_piece(i) for i in range(s.vocab_size())] for s in (new, embedded)]
    assert pieces[0] == pieces[1]


def test_special_ids_are_those_of_umt5(tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "spiece.model", captions=2000, seed=5)
    made = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert made.vocab_size() == VOCABULARY
    assert (made.pad_id(), made.eos_id(), made.unk_id(), made.bos_id()) == (0, 1, 2, -1)
    assert made.encode("RED Circle") == made.encode("red circle")
    assert made.decode(made.encode("猫 🐈")) == "猫 🐈"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        train_tokenizer(tmp_path / "file" / "spiece.model", captions=2000)
