"""How large the step is that `bench transformer` times, and how it grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import RequestError
from ..models.vae import SPATIAL_FACTOR, latent_frames
from ..request import check_frames
from ..specs import RESOLUTIONS, SIZE_STEP

VIDEOS = (("480p", 21), ("480p", 49), ("480p", 81), ("720p", 81), ("720p", 121))  # 9,360 to 111,600 tokens
TOP_KS = (0.05, 0.1, 0.2, 0.3, 0.5)
VARIED = ("tokens", "top-k")


@dataclass(frozen=True)
class Step:
    """What a step's time depends on besides the model.

    resolution: a name of `specs.RESOLUTIONS`, at 16:9. num_frames: 4k+1. top_k: share of key blocks kept.

    Raises:
        RequestError: no such resolution, or another number of frames.
    """

    resolution: str = "480p"
    num_frames: int = 81
    top_k: float = 0.1

    def __post_init__(self) -> None:
        if self.resolution not in RESOLUTIONS:
            raise RequestError(f"resolution must be one of {', '.join(RESOLUTIONS)}, got '{self.resolution}'")
        check_frames(self.num_frames)

    @property
    def width_height(self) -> tuple[int, int]:
        """Pixels."""
        return RESOLUTIONS[self.resolution]["16:9"]

    @property
    def latent(self) -> tuple[int, int, int]:
        """Frames, height, width."""
        width, height = self.width_height
        return latent_frames(self.num_frames), height // SPATIAL_FACTOR, width // SPATIAL_FACTOR

    @property
    def tokens(self) -> int:
        width, height = self.width_height
        return latent_frames(self.num_frames) * (height // SIZE_STEP) * (width // SIZE_STEP)

    @property
    def name(self) -> str:
        """In a few words; the usual frames and top-k go without saying."""
        usual = Step()
        frames = "" if self.num_frames == usual.num_frames else f" {self.num_frames} frames"
        top_k = "" if self.top_k == usual.top_k else f" top-k {self.top_k:g}"
        return "{}x{}".format(*self.width_height) + frames + top_k


def growth(step: Step, vary: Sequence[str]) -> list[Step]:
    """The step itself, or those that differ from it in what varies, none twice.

    Args:
        vary: any of VARIED: "tokens" goes through VIDEOS, "top-k" through TOP_KS.

    Raises:
        RequestError: an unknown name.
    """
    steps = [] if vary else [step]
    for what in vary:
        if what not in VARIED:
            raise RequestError(f"what varies must be one of {', '.join(VARIED)}, got '{what}'")
        if what == "tokens":
            steps += [replace(step, resolution=name, num_frames=frames) for name, frames in VIDEOS]
        else:
            steps += [replace(step, top_k=top_k) for top_k in TOP_KS]
    return list(dict.fromkeys(steps))
