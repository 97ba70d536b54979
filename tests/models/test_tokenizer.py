"""Prompts to ids: cleaning, the end token, truncation and padding."""

import io

import pytest
import sentencepiece
import torch

from turbowan.models.tokenizer import END, PAD, TEXT_LENGTH, Tokenizer, clean


@pytest.fixture(scope="module")
def pieces():
    """A real SentencePiece model with T5's special ids, trained on a few sentences."""
    model = io.BytesIO()
    words = ["a", "red", "blue", "green", "circle", "square", "moves", "turns", "left", "right", "红色", "的", "圆"]
    sentences = [" ".join(words[i:] + words[:i]) for i in range(len(words))] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=80, character_coverage=1.0,
        pad_id=PAD, eos_id=END, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("  a \t red\n\ncircle ", "a red circle"),
        ("A Red CIRCLE", "A Red CIRCLE"),
        ("salt &amp;amp; pepper &lt;3", "salt & pepper <3"),
        ("a &amp;amp; b < c", "a & b < c"),  # ftfy leaves escapes alone beside a bare "<"
        ("cafÃ© with a naÃ¯ve cat", "café with a naïve cat"),
        ("红色的圆\u3000向右", "红色的圆 向右"),
        ("", ""),
    ],
)
def test_cleaning(prompt, expected):
    assert clean(prompt) == expected


def test_ids_end_with_the_end_token_and_are_padded(pieces):
    tokenizer = Tokenizer.from_sentencepiece(pieces)
    split = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    prompts = ["a red circle moves right", "", "红色 的 圆"]
    ids, mask = tokenizer(prompts)
    assert ids.shape == mask.shape == (3, TEXT_LENGTH)
    assert ids.dtype == mask.dtype == torch.int64
    for row, prompt in enumerate(prompts):
        expected = [*split.encode(prompt), END]
        assert ids[row, : len(expected)].tolist() == expected
        assert mask[row].tolist() == [1] * len(expected) + [0] * (TEXT_LENGTH - len(expected))
        assert (ids[row, len(expected) :] == PAD).all()


def test_a_long_prompt_is_cut_and_still_ends(pieces):
    ids, mask = Tokenizer.from_sentencepiece(pieces)(["red circle " * 5000])
    assert mask.all()
    assert ids[0, -1] == END
    assert (ids[0, :-1] != END).all()
