"""A request and a manifest, together: every value that a generation needs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from .checkpoints.manifest import Manifest
from .errors import Note, RequestError
from .request import GenerateRequest
from .specs import RESOLUTIONS, SIZE_STEP

FEW_STEPS, MANY_STEPS = 4, 10  # what distilled weights were made for; the least that others give a picture with


@dataclass(frozen=True)
class Settings:
    """All values resolved; sizes in pixels, times in 0..1."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: int
    sampler: str
    num_steps: int
    ode: bool
    sigma_max: float
    shift: float
    guidance_scale: float
    boundary: float
    attention: str
    sla_topk: float
    seed: int
    noise_device: str
    num_samples: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def resolve(request: GenerateRequest, manifest: Manifest, image_size: tuple[int, int] | None = None) -> Settings:
    """Fill what the request leaves open from the manifest.

    Args:
        image_size: (width, height) of the request's image, for adaptive resolution.

    Warns:
        Note: distilled weights are asked for more steps than they were made for, others for fewer than 10, or a value
            is given that has no effect here.
    """

    def chosen(name: str) -> object:
        value = getattr(request, name)
        return getattr(manifest, name) if value is None else value

    width, height = choose_size(request, manifest, image_size)
    values = {
        name: chosen(name)
        for name in (
            "num_frames", "fps", "sampler", "num_steps", "sigma_max", "shift", "guidance_scale", "boundary", "sla_topk",
        )
    }  # fmt: skip
    attention = manifest.attention if request.attention == "auto" else request.attention
    settings = Settings(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or manifest.negative_prompt,
        width=width,
        height=height,
        ode=request.ode,
        attention=attention,
        seed=request.seed,
        noise_device=request.noise_device,
        num_samples=request.num_samples,
        **values,  # type: ignore[arg-type]
    )
    for note in _notes(request, manifest, settings):
        warnings.warn(note, Note, stacklevel=3)
    return settings


def _notes(request: GenerateRequest, manifest: Manifest, settings: Settings) -> Iterator[str]:
    if manifest.distilled and settings.num_steps > FEW_STEPS:
        yield f"{manifest.name} is distilled for {manifest.num_steps} steps; {settings.num_steps} rarely look better"
    if not manifest.distilled and settings.num_steps < MANY_STEPS:
        yield (
            f"{manifest.name} is not distilled: {settings.num_steps} steps are too few for a clear picture"
            f" (its default is {manifest.num_steps})"
        )
    rcm = settings.sampler == "rcm"
    unused = {
        "ode": request.ode and not rcm and f"with the sampler {settings.sampler}",
        "sigma_max": request.sigma_max is not None and not rcm and f"with the sampler {settings.sampler}",
        "shift": request.shift is not None and rcm and "with the sampler rcm",
        "boundary": request.boundary is not None and not manifest.two_experts and "with a single transformer",
        "negative_prompt": request.negative_prompt and settings.guidance_scale == 1 and "without guidance (scale 1)",
        "aspect_ratio": request.aspect_ratio != "16:9" and request.width is not None and "beside width and height",
    }
    yield from (f"{name} has no effect {why}" for name, why in unused.items() if why)


def choose_size(
    request: GenerateRequest, manifest: Manifest, image_size: tuple[int, int] | None
) -> tuple[int, int]:
    """Width and height in pixels."""
    if request.width is not None and request.height is not None:
        width, height = request.width, request.height
    elif request.resolution is None and manifest.width and manifest.height:
        width, height = manifest.width, manifest.height
        if request.aspect_ratio != "16:9":
            columns, rows = (int(x) for x in request.aspect_ratio.split(":"))
            width, height = fit_area(width * height, rows / columns)
    else:
        width, height = RESOLUTIONS[request.resolution or manifest.resolution][request.aspect_ratio]
    if request.adaptive_resolution:
        if image_size is None:
            raise RequestError("adaptive_resolution needs an image")
        width, height = fit_area(width * height, image_size[1] / image_size[0])
    return width, height


def fit_area(area: int, ratio: float) -> tuple[int, int]:
    """Width and height of about this area in the given ratio (height over width), rounded to multiples of 16.

    The order of operations is the official code's: at halves, another one rounds to a size 16 pixels apart.
    """
    width = SIZE_STEP * round(math.sqrt(area / ratio) / SIZE_STEP)
    height = SIZE_STEP * round(math.sqrt(area * ratio) / SIZE_STEP)
    return max(SIZE_STEP, width), max(SIZE_STEP, height)
