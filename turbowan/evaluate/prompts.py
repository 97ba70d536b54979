"""Held-out prompts generated and judged: is everything they say in the picture?"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints.files import replacing
from ..engine import Engine
from ..errors import RequestError
from ..media.image import contact_sheet
from ..request import GenerateRequest
from ..world.analyse import analyse_camera, analyse_shapes, matches
from ..world.captions import caption
from ..world.scenes import CAMERAS, COLOURS, MOTIONS, SHAPES, TEXTURES, draw_scenes
from .interval import share

SHEET_CLIPS = 32


def evaluate_prompts(
    engine: Engine,
    prompts: int,
    request: GenerateRequest,
    batch: int = 8,
    sheet: Path | None = None,
    camera: bool = False,
    scene_seed: int = 24_680,
) -> dict[str, Any]:
    """Generate captions of combinations never seen in training and look at what came out.

    Args:
        prompts: how many.
        request: steps, attention, precision … for all of them; its seed numbers the batches' noise.
        batch: generated together.
        sheet: where to write a picture of the first clips.
        scene_seed: which prompts are drawn.
        camera: captions of a moving camera (none of these are held out) instead of a moving shape.

    Raises:
        RequestError: no prompts, or none at a time.

    Returns:
        right: per point and for "all", the share with its 95 % interval. wrong_by: for the points a prompt missed, how
        often each value missed it. motion: mean change between frames.
    """
    if prompts < 1 or batch < 1:
        raise RequestError(f"an evaluation takes at least 1 prompt, 1 at a time; got {prompts}, {batch} at a time")
    scenes = draw_scenes(
        prompts, torch.Generator().manual_seed(scene_seed), 1.0 if camera else 0.0, held_out=None if camera else True
    )
    texts = caption(scenes, random.Random(scene_seed))
    right: dict[str, list[bool]] = {}
    clips: list[np.ndarray] = []
    motion = 0.0
    for start in range(0, prompts, batch):
        rows = slice(start, min(start + batch, prompts))
        part = scenes[rows]
        result = engine.generate_batch(texts[rows], replace(request, seed=request.seed + start // batch))
        video = torch.from_numpy(np.stack(result.videos)).to(engine.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        motion += float(video.diff(dim=2).abs().mean(dim=(1, 2, 3, 4)).sum())
        if camera:
            found = {"direction": analyse_camera(video) == part.camera.to(engine.device)}
        else:
            found = matches(analyse_shapes(video), part.to(engine.device))
        found["all"] = torch.stack(list(found.values())).all(dim=0)
        for name, values in found.items():
            right.setdefault(name, []).extend(values.tolist())
        clips += result.videos[: max(0, SHEET_CLIPS - len(clips))]
        if sys.stderr.isatty():
            end = "\r" if rows.stop < prompts else "\n"
            print(f"{rows.stop}/{prompts} prompts", end=end, file=sys.stderr, flush=True)
    if sheet is not None:
        labels = [f"{'+' if ok else '-'} {text}" for ok, text in zip(right["all"], texts, strict=True)]
        with replacing(sheet) as partial:
            contact_sheet(clips, labels[: len(clips)]).save(partial, format="PNG")
    named: dict[str, tuple[str, tuple[str, ...]]] = {
        "direction": ("camera", CAMERAS) if camera else ("motion", MOTIONS),
        "colour": ("colour", tuple(COLOURS)),
        "shape": ("shape", SHAPES),
        "background": ("texture", TEXTURES),
    }
    wrong_by = {}
    for point, (attribute, names) in named.items():
        if point in right:
            indices = getattr(scenes, attribute).tolist()
            missed = [names[i] for i, ok in zip(indices, right[point], strict=True) if not ok]
            wrong_by[point] = {name: missed.count(name) for name in names if name in missed}
    return {
        "prompts": prompts,
        "right": {name: share(sum(values), prompts) for name, values in right.items()},
        "wrong_by": wrong_by,
        "motion": motion / prompts,
    }
