"""What the tests of media share: clips, how files are read again, and how far they are apart."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from turbowan.world.scenes import MOTIONS, draw_scenes, render


@pytest.fixture
def clip() -> Callable[..., np.ndarray]:
    """A clip of the procedural world in which something moves, uint8 [T, H, W, 3]."""
    seed = random.randrange(2**31)
    print(f"seed {seed}")

    def make(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
        scenes = draw_scenes(20, torch.Generator().manual_seed(seed), held_out=None)
        moving = scenes.motion < MOTIONS.index("turn")  # away from where it starts
        video = render(scenes[moving][:1], frames, height, width)[0]
        return ((video + 1) * 127.5 + 0.5).byte().permute(1, 2, 3, 0).contiguous().numpy()

    return make


@pytest.fixture
def decode() -> Callable[[Path], tuple[np.ndarray, Fraction]]:
    """All frames of a container, and its frames per second."""

    def read(path: Path) -> tuple[np.ndarray, Fraction]:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert stream.average_rate is not None
            return np.stack(frames), stream.average_rate

    return read


@pytest.fixture
def psnr() -> Callable[[np.ndarray, np.ndarray], float]:
    """In dB, of 8-bit pictures."""

    def measure(a: np.ndarray, b: np.ndarray) -> float:
        assert a.shape == b.shape
        return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))

    return measure


@pytest.fixture
def files_in() -> Callable[[Path], list[str]]:
    """The names of all that is in a folder and below."""
    return lambda folder: sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
