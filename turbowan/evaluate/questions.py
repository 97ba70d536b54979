"""What models are asked: held-out scenes and pictures with their prompts, and who judges the answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import RequestError
from ..media.image import read_image, to_tensor
from ..stages import to_uint8
from ..world.analyse import analyse_camera, analyse_shapes, matches
from ..world.captions import camera_captions, caption
from ..world.pictures import draw_pictures, move_camera
from ..world.scenes import CAMERAS, COLOURS, MOTIONS, SHAPES, TEXTURES, Scenes, draw_scenes, render
from .measure import camera_travel, outline_travel
from .seeds import PICTURE_SEED, SCENE_SEED

PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_TOGETHER = 8  # pictures drawn from one seed

Size = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class Given:
    """Some rows as a model gets them, on its device.

    clips: [B, 3, T, H, W] in -1..1, what the world itself shows; None for photographs. pictures: [B, 3, H, W] in -1..1,
    of 8 bits, the first frames that image-to-video starts from; None for text-to-video.
    """

    clips: Tensor | None
    pictures: Tensor | None


class Questions(Protocol):
    """Prompts by row, what is right, and a judge.

    what: a name for the report. asked: what makes the same questions again. answers: point -> what each row's prompt
    says of it; "direction" is always there.
    """

    what: str
    asked: dict[str, Any]
    texts: list[str]
    answers: dict[str, list[str]]
    from_pictures: bool

    def give(self, rows: Sequence[int], size: Size, device: torch.device) -> Given: ...

    def judge(self, video: Tensor, rows: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Clips in -1..1 that answer these rows: point -> bool [B], and how far things moved: [B], in heights of the
        frame, NaN where no thing was found."""
        ...


class ShapeQuestions:
    """Shapes that move over backgrounds, in combinations that training never shows.

    Args:
        count: how many. seed: which. from_pictures: for image-to-video; the scenes' first frames are given.
    """

    what = "shapes"

    def __init__(self, count: int, seed: int = SCENE_SEED, from_pictures: bool = False) -> None:
        _check_count(count)
        self.scenes = draw_scenes(count, torch.Generator().manual_seed(seed), held_out=True)
        self.texts = caption(self.scenes, random.Random(seed))
        self.from_pictures = from_pictures
        self.asked = {"scene_seed": seed, "prompts": count}
        self.answers = {
            "colour": _names(tuple(COLOURS), self.scenes.colour),
            "shape": _names(SHAPES, self.scenes.shape),
            "direction": _names(MOTIONS, self.scenes.motion),
            "background": _names(TEXTURES, self.scenes.texture),
        }

    def give(self, rows: Sequence[int], size: Size, device: torch.device) -> Given:
        return _give_scenes(self.scenes, rows, size, device, self.from_pictures)

    def judge(self, video: Tensor, rows: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        found = analyse_shapes(video)
        right = matches(found, self.scenes[torch.tensor(rows)].to(video.device))
        return right, outline_travel(found.mask).masked_fill(~found.visible, torch.nan)


class CameraQuestions:
    """Cameras that move over textures of two colours."""

    what = "camera"
    from_pictures = False

    def __init__(self, count: int, seed: int = SCENE_SEED) -> None:
        _check_count(count)
        self.scenes = draw_scenes(count, torch.Generator().manual_seed(seed), camera_share=1.0, held_out=None)
        self.texts = caption(self.scenes, random.Random(seed))
        self.asked = {"scene_seed": seed, "prompts": count}
        self.answers = {"direction": _names(CAMERAS, self.scenes.camera)}

    def give(self, rows: Sequence[int], size: Size, device: torch.device) -> Given:
        return _give_scenes(self.scenes, rows, size, device, self.from_pictures)

    def judge(self, video: Tensor, rows: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        return _judge_camera(video, self.scenes.camera[torch.tensor(rows)])


class PictureQuestions:
    """Cameras that move over rich still pictures drawn for this alone; the first frames are given."""

    what = "pictures"
    from_pictures = True

    def __init__(self, count: int, seed: int = PICTURE_SEED) -> None:
        _check_count(count)
        generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.camera = torch.randint(len(CAMERAS), (count,), generator=generator)
        self.amount = torch.rand(count, generator=generator)
        self.texts = camera_captions(self.camera, random.Random(seed))
        self.asked = {"scene_seed": seed, "prompts": count}
        self.answers = {"direction": _names(CAMERAS, self.camera)}

    def give(self, rows: Sequence[int], size: Size, device: torch.device) -> Given:
        frames, height, width = size
        drawn: list[Tensor] = []
        for block in sorted({row // _TOGETHER for row in rows}):
            pictures = draw_pictures(_TOGETHER, torch.Generator().manual_seed(self.seed + block), device, height)
            drawn += [pictures[row % _TOGETHER] for row in rows if row // _TOGETHER == block]
        index = torch.tensor(rows)
        camera, amount = self.camera[index].to(device), self.amount[index].to(device)
        clips = move_camera(torch.stack(drawn), camera, amount, frames, height, width)
        return Given(clips, _eight_bits(clips[:, :, 0]))

    def judge(self, video: Tensor, rows: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        return _judge_camera(video, self.camera[torch.tensor(rows)])


class PhotoQuestions:
    """Every camera over every photograph of a folder, resized as a user's picture would be.

    Raises:
        RequestError: the folder holds no pictures. MediaError: one cannot be read.
    """

    what = "photos"
    from_pictures = True

    def __init__(self, folder: Path, seed: int = PICTURE_SEED) -> None:
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        paths = [path for path in found if path.suffix.lower() in PHOTO_SUFFIXES]
        if not paths:
            raise RequestError(f"{folder} is no folder with pictures ({', '.join(PHOTO_SUFFIXES)})")
        self.photos = [read_image(path) for path in paths]
        self.camera = torch.arange(len(CAMERAS)).repeat(len(paths))
        self.texts = camera_captions(self.camera, random.Random(seed))
        self.asked = {"scene_seed": seed, "photos": [path.name for path in paths]}
        names = [path.name for path in paths for _ in CAMERAS]
        self.answers = {"direction": _names(CAMERAS, self.camera), "photo": names}

    def give(self, rows: Sequence[int], size: Size, device: torch.device) -> Given:
        _, height, width = size
        pictures = [to_tensor(self.photos[row // len(CAMERAS)], height, width) for row in rows]
        return Given(None, torch.cat(pictures).to(device))

    def judge(self, video: Tensor, rows: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        return _judge_camera(video, self.camera[torch.tensor(rows)])


def _give_scenes(scenes: Scenes, rows: Sequence[int], size: Size, device: torch.device, pictured: bool) -> Given:
    clips = render(scenes[torch.tensor(rows)].to(device), *size)
    return Given(clips, _eight_bits(clips[:, :, 0]) if pictured else None)


def _judge_camera(video: Tensor, camera: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return {"direction": analyse_camera(video) == camera.to(video.device)}, camera_travel(video)


def _eight_bits(pictures: Tensor) -> Tensor:
    return to_uint8(pictures).float() / 127.5 - 1


def _names(names: Sequence[str], index: Tensor) -> list[str]:
    return [names[i] for i in index.tolist()]


def _check_count(count: int) -> None:
    if count < 1:
        raise RequestError(f"an evaluation takes at least 1 prompt, got {count}")
