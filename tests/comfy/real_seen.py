"""What a video that came out of ComfyUI shows, as `turbowan evaluate` sees it."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
from real_server import Server

from turbowan.world.analyse import analyse_camera, analyse_shapes
from turbowan.world.scenes import CAMERAS, COLOURS, MOTIONS, SHAPES, TEXTURES


def shown(outputs: dict, server: Server, key: str = "save") -> np.ndarray:
    """The frames of the video that a node saved."""
    return read_frames(server.file(outputs[key]["images"][0]))


def read_frames(path: Path) -> np.ndarray:
    """uint8 [T, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def shape_seen(frames: np.ndarray) -> dict[str, str]:
    """Colour, shape, motion, background and texture in a clip of one shape; nothing where there is no shape."""
    found = analyse_shapes(_clip(frames))
    if not bool(found.visible):
        return {}
    return {
        "colour": tuple(COLOURS)[int(found.colour)], "shape": SHAPES[int(found.shape)],
        "motion": MOTIONS[int(found.motion)], "background": tuple(COLOURS)[int(found.background)],
        "texture": TEXTURES[int(found.texture)],
    }  # fmt: skip


def camera_seen(frames: np.ndarray) -> str:
    """How the camera moves in a clip of a still scene."""
    return CAMERAS[int(analyse_camera(_clip(frames)))]


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """dB between two clips in uint8; infinite where they are the same."""
    error = float(np.square(one.astype(np.float64) - other).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def _clip(frames: np.ndarray) -> torch.Tensor:
    """uint8 [T, H, W, 3] to float32 [1, 3, T, H, W] in -1..1."""
    return torch.from_numpy(frames).movedim(-1, 0)[None].float() / 127.5 - 1
