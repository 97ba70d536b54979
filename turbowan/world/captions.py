"""Captions of scenes, in many wordings."""

from __future__ import annotations

import random

from torch import Tensor

from .scenes import CAMERA_TEXTURES, CAMERAS, COLOURS, MOTIONS, SHAPES, TEXTURES, Scenes

_COLOUR_NAMES = tuple(COLOURS)
_SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc", "ball", "dot"),
    "square": ("square", "square", "box", "block"),
    "triangle": ("triangle",),
    "ring": ("ring", "ring", "hoop", "donut"),
}
_DIRECTION_VERBS = ("moves", "moves", "moves", "slides", "glides", "drifts", "travels", "goes", "is moving", "moving")
_DIRECTIONS = {
    "left": ("left", "to the left", "leftwards", "from right to left"),
    "right": ("right", "to the right", "rightwards", "from left to right"),
    "up": ("up", "upwards", "up the frame", "to the top"),
    "down": ("down", "downwards", "down the frame", "to the bottom"),
}
_MOTION_WORDS = {
    "up": ("rises",),
    "down": ("falls", "sinks"),
    "grow": ("grows", "gets bigger", "becomes larger", "expands", "is growing", "growing"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller", "contracts", "is shrinking", "shrinking"),
    "turn": ("turns", "rotates", "spins", "turns around", "is rotating", "spinning"),
    "bounce": ("bounces", "bounces up and down", "jumps up and down", "is bouncing", "bouncing"),
    "still": ("stays still", "does not move", "rests", "stands still", "is at rest"),
}
_BACKGROUND_WORDS = {
    "plain": ("{} background", "{} background", "plain {} background", "{} wall"),
    "striped": ("{} striped background", "striped {} background", "background of {} stripes"),
    "checkered": ("{} checkered background", "checkered {} background", "background of {} checks"),
    "dotted": ("{} dotted background", "dotted {} background", "background of {} dots"),
}
_CAMERA_WORDS = {
    "pan left": ("pans left", "moves to the left", "pans to the left"),
    "pan right": ("pans right", "moves to the right", "pans to the right"),
    "pan up": ("pans up", "moves up", "tilts up"),
    "pan down": ("pans down", "moves down", "tilts down"),
    "zoom in": ("zooms in", "zooms in", "moves closer"),
    "zoom out": ("zooms out", "zooms out", "moves away"),
}
_CAMERA_TEXTURE_WORDS = {
    "striped": ("stripes",),
    "checkered": ("checks", "checkers", "squares"),
    "dotted": ("dots", "spots"),
    "cloudy": ("clouds", "mist", "fog"),
}


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _motion_words(motion: str, rng: random.Random) -> str:
    if motion in _DIRECTIONS and (motion not in _MOTION_WORDS or rng.random() < 0.75):
        return f"{rng.choice(_DIRECTION_VERBS)} {rng.choice(_DIRECTIONS[motion])}"
    return rng.choice(_MOTION_WORDS[motion])


def _shape_caption(scenes: Scenes, i: int, rng: random.Random) -> str:
    colour = _COLOUR_NAMES[int(scenes.colour[i])]
    motion_name = MOTIONS[int(scenes.motion[i])]
    noun = rng.choice(_SHAPE_WORDS[SHAPES[int(scenes.shape[i])]])
    size = ""
    if motion_name not in ("grow", "shrink") and rng.random() < 0.5:
        size = rng.choice(("large ", "big ")) if scenes.large[i] else rng.choice(("small ", "little "))
    thing = _article(f"{size}{colour} {noun}")
    motion = _motion_words(motion_name, rng)
    texture = TEXTURES[int(scenes.texture[i])]
    where = rng.choice(_BACKGROUND_WORDS[texture]).format(_COLOUR_NAMES[int(scenes.background[i])])
    style = rng.random()
    if style < 0.55:
        text = f"{thing} {motion} {rng.choice(('on', 'on', 'over', 'against', 'in front of'))} {_article(where)}"
    elif style < 0.75:
        text = f"{_article(where)}, {thing} {motion}"
    elif style < 0.9:
        text = f"{thing} on {_article(where)} {motion}"
    else:
        text = f"a video of {thing} that {motion} on {_article(where)}"
    return text


def _camera_caption(scenes: Scenes, i: int, rng: random.Random) -> str:
    motion = rng.choice(_CAMERA_WORDS[CAMERAS[int(scenes.camera[i])]])
    first, second = (_COLOUR_NAMES[int(index[i])] for index in (scenes.colour, scenes.background))
    if rng.random() < 0.5:
        first, second = second, first
    texture = f"{first} and {second} {rng.choice(_CAMERA_TEXTURE_WORDS[CAMERA_TEXTURES[int(scenes.texture[i])]])}"
    if rng.random() < 0.7:
        return f"the camera {motion} over {texture}"
    return f"{texture}, the camera {motion}"


def caption(scenes: Scenes, rng: random.Random) -> list[str]:
    """One caption per scene; wording, capitals and full stop vary with `rng`."""
    captions = []
    for i in range(len(scenes)):
        text = (_camera_caption if scenes.is_camera[i] else _shape_caption)(scenes, i, rng)
        text = _styled(text, rng)
        if rng.random() < 0.15:
            text = text.replace("grey", "gray")
        captions.append(text)
    return captions


def _styled(text: str, rng: random.Random) -> str:
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.2 else text


def camera_captions(camera: Tensor, rng: random.Random) -> list[str]:
    """One caption per index into CAMERAS that says how the camera moves and nothing of what it sees."""
    captions = []
    for index in camera.tolist():
        motion = rng.choice(_CAMERA_WORDS[CAMERAS[index]])
        text = rng.choice(("the camera {}", "the camera {}", "{}", "camera {}", "a video in which the camera {}"))
        text = text.format(motion) + rng.choice(("", "", "", " slowly", " over the picture", " over the scene"))
        captions.append(_styled(text, rng))
    return captions
