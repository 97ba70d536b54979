"""The last prompts' embeddings: bounded, least asked for goes first, copies on the host."""

import torch

from turbowan.memory.embeddings import Embeddings


def test_bounded_and_the_least_asked_for_goes():
    texts = Embeddings(limit=3)
    for name in "abc":
        texts.put(name, torch.full((2, 4), ord(name)))
    assert texts.get("a") is not None
    texts.put("d", torch.zeros(2, 4))
    assert texts.get("b") is None
    assert [texts.get(name) is not None for name in "acd"] == [True, True, True]
    assert texts.get("a")[0, 0] == ord("a")


def test_keeps_a_copy():
    texts, text = Embeddings(), torch.randn(3, 4)
    texts.put("x", text)
    kept = text.clone()
    text.zero_()
    assert torch.equal(texts.get("x"), kept)
