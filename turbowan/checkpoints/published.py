"""Which models are published where, as data: names, repositories, files, and how each is sampled."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from ..errors import CheckpointError

QUANT = "-quant"


@dataclass(frozen=True)
class Part:
    """The files of one role, under the names they have in their repository.

    path: what a manifest names, a file or (ending in "/") a folder. shards: pattern of the files that `path` indexes.
    """

    repo: str
    path: str
    shards: str | None = None

    def holds(self, path: str) -> bool:
        """Whether a file of the repository belongs to this part."""
        if self.path.endswith("/"):
            return path.startswith(self.path)
        return path == self.path or (self.shards is not None and fnmatchcase(path, self.shards))


@dataclass(frozen=True)
class Published:
    """A model as it is published.

    family: a key of `specs.FAMILIES`; None for files that are no whole model. settings: where this model's differ from
    its family's. quant: the parts that replace their namesakes in the int8 variant.
    """

    name: str
    about: str
    family: str | None
    parts: Mapping[str, Part]
    quant: Mapping[str, Part] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def repo(self) -> str:
        return next(iter(self.parts.values())).repo


_BASE = "Wan-AI/Wan2.1-T2V-1.3B"  # the VAE and the text encoder are the same files in all of Wan's repositories
_TOKENIZER = {"tokenizer": Part(_BASE, "google/umt5-xxl/")}
_SHARED = {
    "vae": Part(_BASE, "Wan2.1_VAE.pth"),
    "text_encoder": Part(_BASE, "models_t5_umt5-xxl-enc-bf16.pth"),
    **_TOKENIZER,
}
_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_SHARDS = "diffusion_pytorch_model-*.safetensors"
_CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def _turbo(repo: str, about: str, family: str, files: Mapping[str, str]) -> Published:
    """`files`: role -> name of the plain weights without .pth; the int8 ones have the same name and -quant."""
    plain = {role: Part(repo, f"{file}.pth") for role, file in files.items()}
    quant = {role: Part(repo, f"{file}{QUANT}.pth") for role, file in files.items()}
    name = repo.split("/")[1]
    settings = {"resolution": name.rpartition("-")[2].lower()}
    return Published(name.lower(), about, family, {**plain, **_SHARED}, quant, settings)


def _turbo_t2v(name: str, about: str) -> Published:
    return _turbo(f"TurboDiffusion/{name}", about, "turbo-t2v", {"transformer": name})


def _wan(name: str, about: str, family: str, parts: Mapping[str, Part], **settings: object) -> Published:
    return Published(name.lower(), about, family, {**parts, **_SHARED}, settings=settings)


def _wan_i2v(resolution: str, **settings: object) -> Published:
    repo = f"Wan-AI/Wan2.1-I2V-14B-{resolution}"
    parts = {"transformer": Part(repo, _INDEX, _SHARDS), "image_encoder": Part(repo, _CLIP)}
    about = f"image to video, {resolution.lower()}"
    return _wan(repo.split("/")[1], about, "wan2.1-i2v", parts, resolution=resolution.lower(), **settings)


def _experts(repo: str) -> dict[str, Part]:
    return {"high_noise": Part(repo, "high_noise_model/"), "low_noise": Part(repo, "low_noise_model/")}


_MODELS = (
    _turbo_t2v("TurboWan2.1-T2V-1.3B-480P", "text to video in 1 to 4 steps"),
    _turbo_t2v("TurboWan2.1-T2V-14B-480P", "text to video in 1 to 4 steps"),
    _turbo_t2v("TurboWan2.1-T2V-14B-720P", "text to video in 1 to 4 steps"),
    _turbo(
        "TurboDiffusion/TurboWan2.2-I2V-A14B-720P", "image to video in 1 to 4 steps", "turbo-i2v",
        {"high_noise": "TurboWan2.2-I2V-A14B-high-720P", "low_noise": "TurboWan2.2-I2V-A14B-low-720P"},
    ),
    _wan(
        "Wan2.1-T2V-1.3B", "text to video, 480p", "wan2.1-t2v",
        {"transformer": Part(_BASE, "diffusion_pytorch_model.safetensors")},
    ),
    _wan(
        "Wan2.1-T2V-14B", "text to video, 480p and 720p", "wan2.1-t2v",
        {"transformer": Part("Wan-AI/Wan2.1-T2V-14B", _INDEX, _SHARDS)},
        shift=5.0, guidance_scale=5.0, resolution="720p",
    ),
    _wan_i2v("480P"),
    _wan_i2v("720P", shift=5.0),
    _wan("Wan2.2-T2V-A14B", "text to video, 480p and 720p", "wan2.2-t2v", _experts("Wan-AI/Wan2.2-T2V-A14B")),
    _wan("Wan2.2-I2V-A14B", "image to video, 480p and 720p", "wan2.2-i2v", _experts("Wan-AI/Wan2.2-I2V-A14B")),
    Published("umt5-xxl-tokenizer", "the text encoder's tokenizer alone", None, _TOKENIZER),
)  # fmt: skip
PUBLISHED = {model.name: model for model in _MODELS}


def find_published(name: str, quant: bool | None = None) -> tuple[Published, bool]:
    """The model of this name, and whether its int8 variant is meant.

    Args:
        name: a key of PUBLISHED or a full repository name in any case; ending in "-quant" it asks for int8.
        quant: True for int8, False for the plain weights; None takes int8 where it is published.

    Raises:
        CheckpointError: no such model (the line names the closest ones), or no such variant.
    """
    wanted = name.strip().rstrip("/").lower()
    base = wanted.removesuffix(QUANT)
    known = {**PUBLISHED, **{model.repo.lower(): model for model in _MODELS if model.family}}
    if base not in known:
        near = difflib.get_close_matches(base.split("/")[-1], PUBLISHED, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(PUBLISHED)}"
        raise CheckpointError(f"no published model is called '{name}'; {hint}")
    model = known[base]
    if base != wanted:
        if quant is False:
            raise CheckpointError(f"'{name}' is the int8 variant; leave out --plain, or the '{QUANT}' of the name")
        quant = True
    if quant and not model.quant:
        raise CheckpointError(f"{model.name} has no published int8 weights; download it and run 'turbowan quantize'")
    return model, bool(model.quant) if quant is None else quant
