"""What a user asks for and what comes back: frozen, validated at construction."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import RequestError
from .specs import ASPECT_RATIOS, FRAME_STEP, RESOLUTIONS, SIZE_STEP

SAMPLERS = ("rcm", "euler", "unipc")
ATTENTION = ("auto", "original", "sla", "sagesla")
PRECISIONS = ("auto", "float32", "bf16", "int8", "fp8", "int8_block")
MEMORY = ("auto", "speed", "balanced", "minimal")
NORMS = ("exact", "official")
MAX_PROMPT = 5_000  # characters; the encoder reads 512 tokens
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class GenerateRequest:
    """One generation. `None` means the value of the model's manifest.

    prompt: up to 5,000 characters, any language. image: path, PIL image or array, for image-to-video models.
    negative_prompt: for models with guidance. resolution: a name of the resolution table, with aspect_ratio; or width
    and height in pixels, multiples of 16. adaptive_resolution: keep the image's aspect ratio at the same area.
    num_frames: 4k+1. fps: frames per second of the file. num_steps: evaluations of the model per sample.
    sampler: "rcm", "euler" or "unipc"; ode: the deterministic form of rcm. sigma_max: first noise level of rcm.
    boundary: time (0..1) at which two experts switch. guidance_scale: 1 means no guidance. shift: of euler and unipc.
    seed: 0..2^64-1. noise_device: "cpu" (the same noise on every machine) or "cuda" (the official code's).
    num_samples: videos from one prompt. attention: "auto", "original", "sla", "sagesla"; sla_topk: share of key blocks.
    precision: "auto" (the device's; a file's 8-bit linear layers in the format that is fast there); "float32", "bf16"
    (linear layers as the file has them); or the transformer's linear layers in 8 bits, whatever the file holds: "int8",
    "fp8" (a scale per row), "int8_block" (per 128 x 128 block, the official format). norms: "exact" or "official".
    memory: "auto", "speed", "balanced" or "minimal". gpu_budget: bytes, or a text such as "12GB".

    Raises:
        RequestError: a value out of range; the line names it, its limits and what was given.
    """

    prompt: str
    image: Any = None
    negative_prompt: str = ""
    resolution: str | None = None
    aspect_ratio: str = "16:9"
    width: int | None = None
    height: int | None = None
    adaptive_resolution: bool = False
    num_frames: int | None = None
    fps: int | None = None
    num_steps: int | None = None
    sampler: str | None = None
    ode: bool = False
    sigma_max: float | None = None
    boundary: float | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    seed: int = 0
    noise_device: str = "cpu"
    num_samples: int = 1
    attention: str = "auto"
    sla_topk: float | None = None
    precision: str = "auto"
    norms: str = "exact"
    memory: str = "auto"
    gpu_budget: int | str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise RequestError(f"{name} must be text, got {type(text).__name__}")
            if len(text) > MAX_PROMPT:
                raise RequestError(f"{name} has {len(text):,} characters; at most {MAX_PROMPT:,} are taken")
        if not self.prompt.strip():
            raise RequestError("the prompt is empty; describe the video in a few words")
        _one_of("resolution", self.resolution, (None, *RESOLUTIONS))
        _one_of("aspect_ratio", self.aspect_ratio, ASPECT_RATIOS)
        _one_of("sampler", self.sampler, (None, *SAMPLERS))
        _one_of("noise_device", self.noise_device, ("cpu", "cuda"))
        _one_of("attention", self.attention, ATTENTION)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("norms", self.norms, NORMS)
        _one_of("memory", self.memory, MEMORY)
        for name in ("width", "height", "num_frames", "fps", "num_steps", "num_samples", "seed"):
            _number(name, getattr(self, name), Integral, "a whole number")
        for name in ("sigma_max", "shift", "boundary", "guidance_scale", "sla_topk"):
            _number(name, getattr(self, name), Real, "a number")
        self._check_size()
        check_frames(self.num_frames)
        _within("fps", self.fps, 1, 240)
        _within("num_steps", self.num_steps, 1, 1000)
        _within("num_samples", self.num_samples, 1, 64)
        _within("seed", self.seed, 0, 2**64 - 1)
        _positive("sigma_max", self.sigma_max)
        _positive("shift", self.shift)
        _within("boundary", self.boundary, 0, 1)
        _within("guidance_scale", self.guidance_scale, 0, 100)
        if self.sla_topk is not None and not 0 < self.sla_topk <= 1:
            raise RequestError(f"sla_topk must be in (0, 1], got {self.sla_topk}")
        if self.gpu_budget is not None:
            parse_bytes(self.gpu_budget)

    def _check_size(self) -> None:
        if (self.width is None) != (self.height is None):
            given = "width" if self.height is None else "height"
            raise RequestError(f"only {given} is given; give both width and height, or a resolution")
        if self.width is not None and self.height is not None:
            if self.resolution is not None:
                raise RequestError("give either a resolution or width and height, not both")
            for name, value in (("width", self.width), ("height", self.height)):
                if value % SIZE_STEP or not SIZE_STEP <= value <= 4096:
                    nearest = max(SIZE_STEP, round(value / SIZE_STEP) * SIZE_STEP)
                    raise RequestError(
                        f"{name} must be a multiple of {SIZE_STEP} from {SIZE_STEP} to 4096 pixels, got {value}"
                        f" (nearest: {min(nearest, 4096)})"
                    )


def check_frames(num_frames: int | None) -> None:
    """Raise RequestError unless the count is 4k+1, naming the nearest that are."""
    if num_frames is None:
        return
    if num_frames < 1 or (num_frames - 1) % FRAME_STEP:
        below = max(1, (num_frames - 1) // FRAME_STEP * FRAME_STEP + 1)
        raise RequestError(f"num_frames must be 4k+1, got {num_frames} (nearest: {below} or {below + FRAME_STEP})")


def parse_bytes(value: int | str) -> int:
    """Bytes from a number or a text with a unit: 12GB is 12 * 10^9, 12GiB is 12 * 2^30."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", str(value).upper())
    unit = match.group(2) if match else None
    if unit in ("K", "M", "G", "T"):
        unit += "B"
    if match is None or unit not in _UNITS or float(match.group(1)) <= 0:
        raise RequestError(f"a memory size looks like 12GB or 12GiB, got '{value}'")
    return int(float(match.group(1)) * _UNITS[unit])


def _one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        names = ", ".join(str(a) for a in allowed if a is not None)
        raise RequestError(f"{name} must be one of {names}, got '{value}'")


def _number(name: str, value: object, kind: type, words: str) -> None:
    fits = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)  # type: ignore[arg-type]
    if value is not None and not fits:
        raise RequestError(f"{name} must be {words}, got {value!r}")


def _within(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise RequestError(f"{name} must be from {low} to {high}, got {value}")


def _positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise RequestError(f"{name} must be positive, got {value}")


class FrameSink(Protocol):
    """Where a generation's frames go as soon as they are decoded; an exception raised here ends the generation."""

    def begin(self, num_samples: int, num_frames: int, fps: int, settings: Mapping[str, object]) -> None:
        """Before any work is done: what will come, and the result's settings."""

    def add(self, sample: int, frames: np.ndarray) -> None:
        """A sample's next frames, uint8 [t, H, W, 3]: a part of the result's videos, which does not change any more."""


@dataclass(frozen=True)
class GenerateResult:
    """What a generation gave.

    videos: one uint8 [T, H, W, 3] per sample. fps: for the file. seed: of the noise. settings: every value used.
    stages: seconds under text, condition, load, denoise, switch, decode, write, total; 0.0 where nothing ran.
    peak_memory: bytes under "gpu" and "host".
    """

    videos: list[np.ndarray]
    fps: int
    seed: int
    settings: Mapping[str, object]
    stages: dict[str, float]
    peak_memory: dict[str, int]

    @property
    def frames(self) -> np.ndarray:
        """The first sample."""
        return self.videos[0]

    def save(self, path: str | Path) -> list[Path]:
        """Write the samples; the suffix chooses the format (.mp4, .webm, .gif, .png for a folder of pictures).

        Several samples get a number before the suffix. Files appear whole or not at all.

        Returns:
            The paths written.
        """
        from .media.saving import save_videos

        return save_videos(self, Path(path))

    def summary(self) -> dict[str, object]:
        """Everything but the pixels, for JSON."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "videos"}
        frames, height, width = self.frames.shape[:3]
        size = {"num_samples": len(self.videos), "frames": frames, "height": height, "width": width}
        return {**size, **kept, "stages": {k: round(v, 3) for k, v in self.stages.items()}}
