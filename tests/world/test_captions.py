"""Captions say what a scene shows, all of it, and the embedded tokenizer knows every word of them."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import sentencepiece
import torch

import turbowan
from turbowan.models.tokenizer import Tokenizer
from turbowan.world.captions import camera_captions, caption
from turbowan.world.scenes import CAMERA_TEXTURES, CAMERAS, COLOURS, MOTIONS, SHAPES, TEXTURES, Scenes, draw_scenes

SPIECE = Path(turbowan.__file__).parent / "assets" / "tiny" / "tokenizer" / "spiece.model"
TEXT_ROWS = 32  # what the transformer was trained with: the longest caption, its end, and one empty row
COLOUR = rf"\b({'|'.join(COLOURS)})\b"

# Written apart from the captions' own tables: what a reader takes each word for.
NOUNS = {
    "circle": "circle", "disc": "circle", "ball": "circle", "dot": "circle", "square": "square", "box": "square",
    "block": "square", "triangle": "triangle", "ring": "ring", "hoop": "ring", "donut": "ring",
}  # fmt: skip
MOTION_WORDS = {
    "bounce": r"bounc|jumps", "grow": r"grow|bigger|larger|expand", "shrink": r"shr|smaller|contract",
    "turn": r"turn|rotat|spin", "still": r"still|not move|rest",
    "left": r"right to left|left$|left |leftwards", "right": r"left to right|right$|right |rightwards",
    "up": r"\bup\b|upwards|top|rises", "down": r"\bdown\b|downwards|bottom|falls|sinks",
}  # fmt: skip
TEXTURE_WORDS = {"striped": r"strip", "checkered": r"check|squares", "dotted": r"dotted|dots|spots"}


def scenes_of(seed: int, count: int = 3000, camera_share: float = 0.0) -> Scenes:
    return draw_scenes(count, torch.Generator().manual_seed(seed), camera_share, held_out=None)


def read_motion(text: str) -> str:
    if re.search(r"bounc|jumps", text):  # "bounces up and down"
        return "bounce"
    for name in ("left", "right"):  # "from right to left" names both
        if re.search({"left": "right to left", "right": "left to right"}[name], text):
            return name
    found = [name for name, words in MOTION_WORDS.items() if re.search(words, text)]
    assert len(found) == 1, f"{text}: {found}"
    return found[0]


def read_shape_caption(text: str) -> dict[str, str]:
    """What a person understands, by a few rules."""
    text = text.lower().rstrip(".").replace("gray", "grey")
    thing = re.search(rf"(?:(large|big|small|little) )?{COLOUR} ({'|'.join(NOUNS)})\b", text)
    assert thing, text
    rest = text.replace(thing[0], "thing")
    ground = re.search(COLOUR, rest)
    assert ground, text
    assert len(re.findall(COLOUR, rest)) == 1, text
    textures = [name for name, words in TEXTURE_WORDS.items() if re.search(words, rest)]
    assert len(textures) <= 1, text
    return {
        "size": {"large": "large", "big": "large", "small": "small", "little": "small"}.get(thing[1] or "", ""),
        "colour": thing[2],
        "shape": NOUNS[thing[3]],
        "background": ground[1],
        "texture": textures[0] if textures else "plain",
        "motion": read_motion(rest),
    }


def test_shape_captions_say_everything(fresh_seed: int) -> None:
    scenes = scenes_of(fresh_seed)
    colours = list(COLOURS)
    for i, text in enumerate(caption(scenes, random.Random(fresh_seed))):
        said = read_shape_caption(text)
        assert said["colour"] == colours[scenes.colour[i]], text
        assert said["shape"] == SHAPES[scenes.shape[i]], text
        assert said["background"] == colours[scenes.background[i]], text
        assert said["texture"] == TEXTURES[scenes.texture[i]], text
        assert said["motion"] == MOTIONS[scenes.motion[i]], text
        if said["motion"] in ("grow", "shrink"):
            assert said["size"] == "", text
        elif said["size"]:
            assert said["size"] == ("large" if scenes.large[i] else "small"), text


CAMERA_WAYS = {
    "pan left": r"(pans|moves to the|pans to the) left", "pan right": r"(pans|moves to the|pans to the) right",
    "pan up": r"(pans|moves|tilts) up", "pan down": r"(pans|moves|tilts) down",
    "zoom in": r"zooms in|moves closer", "zoom out": r"zooms out|moves away",
}  # fmt: skip


def read_camera(text: str) -> list[str]:
    return [name for name, way in CAMERA_WAYS.items() if re.search(way, text)]


def test_captions_of_pictures_say_the_cameras_way_alone(fresh_seed: int) -> None:
    camera = torch.randint(len(CAMERAS), (1500,), generator=torch.Generator().manual_seed(fresh_seed))
    texts = camera_captions(camera, random.Random(fresh_seed))
    others = rf"{COLOUR}|gray|{'|'.join(TEXTURE_WORDS.values())}|cloud|mist|fog|{'|'.join(NOUNS)}"
    for index, text in zip(camera.tolist(), texts, strict=True):
        assert read_camera(text.lower()) == [CAMERAS[index]], text
        assert not re.search(others, text.lower()), text
    assert len(set(texts)) > 100
    assert texts == camera_captions(camera, random.Random(fresh_seed))
    assert texts != camera_captions(camera, random.Random(fresh_seed + 1))


def test_camera_captions_say_everything(fresh_seed: int) -> None:
    scenes = scenes_of(fresh_seed, 1500, camera_share=1.0)
    colours = list(COLOURS)
    for i, text in enumerate(caption(scenes, random.Random(fresh_seed))):
        lower = text.lower().replace("gray", "grey")
        assert read_camera(lower) == [CAMERAS[scenes.camera[i]]], text
        assert set(re.findall(COLOUR, lower)) == {colours[scenes.colour[i]], colours[scenes.background[i]]}, text
        textures = [n for n, words in {**TEXTURE_WORDS, "cloudy": "cloud|mist|fog"}.items() if re.search(words, lower)]
        assert textures == [CAMERA_TEXTURES[scenes.texture[i]]], text


def test_a_seed_writes_the_same_captions(fresh_seed: int) -> None:
    scenes = scenes_of(fresh_seed, 200, 0.2)
    first = caption(scenes, random.Random(fresh_seed))
    assert first == caption(scenes, random.Random(fresh_seed))
    other = caption(scenes, random.Random(fresh_seed + 1))
    assert sum(a != b for a, b in zip(first, other, strict=True)) > 150


def test_wordings_vary_and_are_english(fresh_seed: int) -> None:
    one = scenes_of(fresh_seed, 1)[torch.zeros(500, dtype=torch.long)]
    texts = caption(one, random.Random(fresh_seed))
    assert len(set(texts)) > 100
    texts += caption(scenes_of(fresh_seed, camera_share=0.3), random.Random(fresh_seed))
    texts += camera_captions(torch.arange(6).repeat(100), random.Random(fresh_seed))
    for text in texts:
        assert not re.search(r"\b[aA] [aeiou]|\b[aA]n [^aeiou]|  |,,| ,|\.\.", text), text
    assert any(t[0].isupper() for t in texts)
    assert any(t.endswith(".") for t in texts)


# The embedded tokenizer


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=SPIECE.read_bytes())


def test_every_word_is_known(fresh_seed: int, pieces: sentencepiece.SentencePieceProcessor) -> None:
    texts = caption(scenes_of(fresh_seed, 10_000, 0.3), random.Random(fresh_seed))
    tokens = pieces.encode(texts)
    flat = [token for row in tokens for token in row]
    assert not any(pieces.is_unknown(token) for token in flat)
    assert sum(pieces.is_byte(token) for token in flat) < 0.003 * len(flat)  # the j of "jumps"
    assert max(len(row) for row in tokens) + 2 <= TEXT_ROWS
    assert len(flat) < 1.5 * sum(len(text.split()) for text in texts)
    ways = pieces.encode(camera_captions(torch.arange(6).repeat(200), random.Random(fresh_seed)))
    assert not any(pieces.is_unknown(token) for row in ways for token in row)
    assert max(len(row) for row in ways) + 2 <= TEXT_ROWS


@pytest.mark.parametrize(
    "prompt", ["一个红色的圆圈向右移动", "🐈‍⬛ 🔴 ➡", "Ünïcödé ñ ß", "красный круг", "\u202eabc\u0000", "x" * 3000]
)
def test_any_other_text_falls_back_to_bytes(prompt: str, pieces: sentencepiece.SentencePieceProcessor) -> None:
    ids = pieces.encode(prompt)
    assert not any(pieces.is_unknown(i) for i in ids)
    normal = pieces.normalize(prompt) if hasattr(pieces, "normalize") else prompt
    assert pieces.decode(ids).replace(" ", "") == normal.replace("▁", " ").replace(" ", "")
    rows, mask = Tokenizer.from_sentencepiece(SPIECE.read_bytes())([prompt])
    assert rows.shape == mask.shape == (1, 512)
    assert int(rows[0, int(mask.sum()) - 1]) == 1  # ends, also when cut
    assert rows.max() < pieces.vocab_size() == 512


def test_captions_come_back_from_their_ids(fresh_seed: int, pieces: sentencepiece.SentencePieceProcessor) -> None:
    for text in caption(scenes_of(fresh_seed, 300, 0.3), random.Random(fresh_seed)):
        assert pieces.decode(pieces.encode(text)) == text.lower()
