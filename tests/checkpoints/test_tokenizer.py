"""Where the tokenizer is looked for, in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbowan.checkpoints.files import write_tensors
from turbowan.checkpoints.tokenizer import find_sentencepiece, find_tokenizer
from turbowan.errors import CheckpointError


@pytest.fixture
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """SentencePiece models that can be told apart: trained on text of one letter, they know that letter alone."""
    import sentencepiece

    def train(letter: str) -> bytes:
        folder = tmp_path_factory.mktemp("pieces")
        (folder / "text").write_text("\n".join([f"{letter} {letter * 2}"] * 9))
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text"), model_prefix=str(folder / "m"), vocab_size=8, minloglevel=2,
            hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        )  # fmt: skip
        return (folder / "m.model").read_bytes()

    return train


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)


def knows(text_encoder: Path, letter: str, given: Path | None = None) -> bool:
    ids, _ = find_tokenizer(text_encoder, given)([letter * 2])
    return 2 not in ids[0].tolist()  # 2 is the unknown piece


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_the_order(
    tmp_path: Path, text_state: dict[str, Tensor], pieces: Callable[[str], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, inside, beside, cached = (pieces(letter) for letter in "abcd")
    cache = put(tmp_path / "cache" / "spiece.model", cached)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: str(cache.parent / name))
    plain, comfy = tmp_path / "model" / "plain.pth", tmp_path / "model" / "comfy.safetensors"
    write_tensors(plain, text_state)
    write_tensors(comfy, {**text_state, "spiece_model": torch.tensor(list(inside), dtype=torch.uint8)})
    assert knows(plain, "d")
    assert not knows(plain, "c")
    put(tmp_path / "model" / "google" / "umt5-xxl" / "spiece.model", beside)
    assert knows(plain, "c")
    assert knows(comfy, "b")
    option = put(tmp_path / "option" / "spiece.model", given)
    for chosen in (option, option.parent):
        assert knows(comfy, "a", chosen)
        assert find_sentencepiece(comfy, chosen) == given
    assert find_sentencepiece(comfy) == inside
    assert find_sentencepiece(plain) == beside


@pytest.mark.parametrize("place", ["tokenizer", "umt5-xxl", "../tokenizer", "../google/umt5-xxl", "."])
def test_places_beside_the_file(
    place: str, tmp_path: Path, text_state: dict[str, Tensor], pieces: Callable[[str], bytes], no_cache: None
) -> None:
    path = tmp_path / "text_encoder" / "model.safetensors"
    write_tensors(path, text_state)
    put(path.parent / place / "spiece.model", pieces("e"))
    assert knows(path, "e")
    assert knows(path.parent, "e")  # named by its folder


def test_none_or_a_bad_one(tmp_path: Path, text_state: dict[str, Tensor], no_cache: None) -> None:
    path = tmp_path / "model" / "text.pth"
    write_tensors(path, text_state)
    with pytest.raises(CheckpointError, match=r"no tokenizer for .*text\.pth: pass --tokenizer.*turbowan download"):
        find_tokenizer(path)
    assert find_sentencepiece(path) is None
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        find_tokenizer(path, tmp_path / "nowhere")
    (tmp_path / "hollow").mkdir()
    for bad in (put(tmp_path / "bad.model", b"no model"), tmp_path / "hollow"):
        with pytest.raises(CheckpointError, match=f"{bad.name} is not a tokenizer folder or Sentence") as error:
            find_tokenizer(path, bad)
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"hollow holds no spiece\.model"):
        find_sentencepiece(path, tmp_path / "hollow")
