"""The Wan family as data: sizes, resolution tables, and what each kind of weights is sampled with by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ASPECT_RATIOS = ("16:9", "9:16", "4:3", "3:4", "1:1")
SIZE_STEP = 16  # pixels; 8 from the VAE times 2 from the patches
FRAME_STEP = 4  # frame counts are 4k+1


def _table(wide: tuple[int, int], standard: tuple[int, int], square: int) -> dict[str, tuple[int, int]]:
    return {
        "16:9": wide, "9:16": wide[::-1], "4:3": standard, "3:4": standard[::-1], "1:1": (square, square),
    }  # fmt: skip


# width x height; "480p" and "480", "720p" and "720" differ, as in the official code
RESOLUTIONS = {
    "480": _table((768, 432), (640, 480), 480),
    "480p": _table((832, 480), (640, 480), 640),
    "512": _table((640, 384), (640, 512), 512),
    "720": _table((1280, 704), (960, 704), 960),
    "720p": _table((1280, 720), (960, 720), 960),
    "1080p": _table((1920, 1088), (1440, 1088), 1440),
}

# what undistilled Wan weights are told to avoid, from Wan's own configuration
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class Defaults:
    """How weights of one kind are sampled unless a manifest or a request says otherwise.

    sigma_max: first noise level of the rCM sampler. shift: time shift of the flow samplers. boundary: time (0..1) at
    which two experts switch. guidance_scale: 1 means none.
    """

    sampler: str
    num_steps: int
    sigma_max: float = 80.0
    shift: float = 5.0
    guidance_scale: float = 1.0
    boundary: float = 0.9
    resolution: str = "480p"
    num_frames: int = 81
    fps: int = 16
    negative_prompt: str = ""

    @property
    def distilled(self) -> bool:
        return self.num_steps <= 8 and self.guidance_scale == 1.0


def _base(num_steps: int, **values: Any) -> Defaults:
    return Defaults("unipc", num_steps, negative_prompt=WAN_NEGATIVE_PROMPT, **values)


FAMILIES: dict[str, Defaults] = {
    "turbo-t2v": Defaults("rcm", 4, sigma_max=80.0),
    "turbo-i2v": Defaults("rcm", 4, sigma_max=200.0, resolution="720p"),
    "wan2.1-t2v": _base(50, shift=8.0, guidance_scale=6.0),
    "wan2.1-i2v": _base(40, shift=3.0, guidance_scale=5.0),
    "wan2.2-t2v": _base(40, shift=12.0, guidance_scale=3.5, boundary=0.875, resolution="720p"),
    "wan2.2-i2v": _base(40, shift=5.0, guidance_scale=3.5, boundary=0.9, resolution="720p"),
    "lightx2v-i2v": Defaults("euler", 4, shift=5.0, resolution="720p"),
    "lightx2v-t2v": Defaults("euler", 4, shift=5.0),
}


def family_of(layout: str, has_sla: bool, two_experts: bool, image_to_video: bool) -> str:
    """The kind of weights a file most likely holds, from what its tensors show: a key of FAMILIES.

    TurboDiffusion's files have SLA projections or a linear patch embedding; other layouts are undistilled Wan, except
    lightx2v's int8 files, which are published with four-step distillation.
    """
    task = "i2v" if image_to_video else "t2v"
    if has_sla or layout in ("official", "turbowan"):
        return f"turbo-{task}"
    if layout == "lightx2v":
        return f"lightx2v-{task}"
    return f"wan2.{2 if two_experts else 1}-{task}"
