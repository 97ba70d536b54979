"""The manifest beside a model's files: what the weights require. TOML, `turbowan.toml`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RequestError
from ..request import GenerateRequest
from ..specs import FAMILIES, RESOLUTIONS, Defaults, family_of
from .detect import detect
from .files import PICKLED, SAFETENSORS, read_tensors, replacing
from .load import read, transformer_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_NAME = "turbowan.toml"
FORMAT = 1
_WHOLE = dict.fromkeys(("num_steps", "width", "height", "num_frames", "fps"), ((int,), "a whole number"))
_NUMBERS = dict.fromkeys(("sigma_max", "shift", "guidance_scale", "boundary", "sla_topk"), ((int, float), "a number"))
_TYPES = {**_WHOLE, **_NUMBERS, "distilled": ((bool,), "true or false")}  # all others are text
_REQUESTED = (*_WHOLE, *_NUMBERS, "sampler", "attention", "negative_prompt")  # what a request can ask for, too
TRANSFORMERS = ("transformer", "high_noise", "low_noise")
ROLES = (*TRANSFORMERS, "vae", "text_encoder", "tokenizer", "image_encoder")


@dataclass(frozen=True)
class Manifest:
    """A model as a whole: its files by role and how it is sampled.

    files: role -> path; either `transformer`, or `high_noise` and `low_noise`. attention: "auto" follows the file.
    width and height, where given, stand before the resolution's table.
    """

    name: str
    family: str
    files: dict[str, Path]
    sampler: str
    num_steps: int
    sigma_max: float = 80.0
    shift: float = 5.0
    guidance_scale: float = 1.0
    boundary: float = 0.9
    negative_prompt: str = ""
    attention: str = "auto"
    sla_topk: float = 0.1
    resolution: str = "480p"
    width: int | None = None
    height: int | None = None
    num_frames: int = 81
    fps: int = 16
    distilled: bool = True
    notes: str = field(default="", compare=False)

    @property
    def two_experts(self) -> bool:
        return "high_noise" in self.files

    @property
    def experts(self) -> dict[str, Path]:
        """The transformers: {"single": path}, or {"high": path, "low": path}."""
        if self.two_experts:
            return {"high": self.files["high_noise"], "low": self.files["low_noise"]}
        return {"single": self.files["transformer"]}


def from_defaults(name: str, family: str, files: Mapping[str, Path], defaults: Defaults | None = None) -> Manifest:
    """A manifest of a family's usual settings (`specs.FAMILIES`)."""
    defaults = defaults or FAMILIES[family]
    return Manifest(name=name, family=family, files=dict(files), distilled=defaults.distilled, **asdict(defaults))


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; relative paths are relative to it.

    Raises:
        CheckpointError: not TOML, an unknown or missing key, or a value out of range.
    """
    if path.is_dir():
        path = path / FILE_NAME
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is not a readable manifest: {reason}") from error
    if document.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is not a manifest of format {FORMAT} (its first line is 'format = {FORMAT}')")
    values: dict[str, Any] = {}
    for key, value in document.items():
        values.update(value if isinstance(value, dict) and key != "files" else {key: value})
    allowed = {f.name for f in fields(Manifest)}
    unknown = sorted(set(values) - allowed)
    missing = sorted({"name", "family", "files", "sampler", "num_steps"} - set(values))
    if unknown or missing:
        what = f"unknown key {unknown[0]}" if unknown else f"no {missing[0]}"
        raise CheckpointError(f"{path} has {what}; known keys: {', '.join(sorted(allowed))}")
    _check_types(values, str(path))
    values["files"] = {role: Path(os.path.normpath(path.parent / file)) for role, file in values["files"].items()}
    manifest = Manifest(**values)
    check_manifest(manifest, str(path))
    return manifest


def _check_types(values: Mapping[str, Any], where: str) -> None:
    for name, value in values.items():
        if name == "files":
            if not isinstance(value, dict) or not value or set(value) - set(ROLES):
                got = ", ".join(map(str, value)) if isinstance(value, dict) else value
                raise CheckpointError(f"{where}: [files] takes {', '.join(ROLES)}; got {got or 'none'}")
            for role, file in value.items():
                if not isinstance(file, str):
                    raise CheckpointError(f"{where}: the {role} must be a path in quotes, got {file}")
            continue
        kind, words = _TYPES.get(name, ((str,), "text in quotes"))
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            raise CheckpointError(f"{where}: {name} must be {words}, got {value!r}")


def check_manifest(manifest: Manifest, where: str) -> None:
    """Raise CheckpointError unless roles and values fit together; each value is held to the limits of a request."""
    roles = set(manifest.files) & set(TRANSFORMERS)
    if roles not in ({"transformer"}, {"high_noise", "low_noise"}):
        got = ", ".join(sorted(roles)) or "none"
        raise CheckpointError(f"{where} needs either a transformer, or a high_noise and a low_noise expert; got {got}")
    lacking = [role for role in ("vae", "text_encoder") if role not in manifest.files]
    if lacking:
        raise CheckpointError(f"{where} has no {' and no '.join(lacking)}; give the file's path")
    try:
        GenerateRequest(prompt="-", **{name: getattr(manifest, name) for name in _REQUESTED})
    except RequestError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if manifest.resolution not in RESOLUTIONS:
        names = ", ".join(RESOLUTIONS)
        raise CheckpointError(f"{where}: resolution must be one of {names}, got '{manifest.resolution}'")


def write_manifest(manifest: Manifest, folder: Path) -> Path:
    """Write `turbowan.toml` into a folder; files in it, and in folders beside it, are named relative to it."""
    sections = {
        "sampling": (
            "sampler", "num_steps", "sigma_max", "shift", "guidance_scale", "boundary", "negative_prompt",
            "attention", "sla_topk",
        ),
        "defaults": ("resolution", "width", "height", "num_frames", "fps"),
    }  # fmt: skip

    folder = folder.absolute()

    def entries(names: Iterable[str]) -> list[str]:
        values = {name: getattr(manifest, name) for name in names}
        return [f"{name} = {_toml(value)}" for name, value in values.items() if value not in (None, "")]

    lines = [f"format = {FORMAT}", *entries(("name", "family", "distilled", "notes"))]
    for section, names in sections.items():
        lines += ["", f"[{section}]", *entries(names)]
    lines += ["", "[files]"]
    for role, path in manifest.files.items():
        path = path.absolute()
        named = os.path.relpath(path, folder) if path.is_relative_to(folder.parent) else path
        lines.append(f"{role} = {_toml(Path(named).as_posix())}")
    target = folder / FILE_NAME
    with replacing(target) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else json.dumps(value, ensure_ascii=False)


def guess_manifest(name: str, files: Mapping[str, Path]) -> Manifest:
    """A manifest for bare files, from what their tensors show."""
    role = "high_noise" if "high_noise" in files else "transformer"
    if role not in files:
        raise CheckpointError("no transformer is given: name --transformer, or --high-noise and --low-noise")
    state, found = read(files[role], "transformer")
    config = transformer_config(state, str(files[role]))
    family = family_of(found.family, config.has_sla, role == "high_noise", config.in_dim > config.out_dim)
    manifest = from_defaults(name, family, files)
    check_manifest(manifest, name)
    return manifest


def find_in_folder(folder: Path) -> Manifest:
    """The model a folder holds: by its manifest, as a diffusers pipeline, or by its files' own contents."""
    if (folder / FILE_NAME).exists():
        return read_manifest(folder)
    if (folder / "model_index.json").exists():
        return _diffusers_folder(folder)
    return _loose_files(folder)


def _diffusers_folder(folder: Path) -> Manifest:
    roles = {"vae": "vae", "text_encoder": "text_encoder", "tokenizer": "tokenizer", "image_encoder": "image_encoder"}
    two = (folder / "transformer_2").is_dir()
    roles |= {"transformer": "high_noise", "transformer_2": "low_noise"} if two else {"transformer": "transformer"}
    files = {role: folder / name for name, role in roles.items() if (folder / name).is_dir()}
    manifest = guess_manifest(folder.resolve().name, files)
    boundary = _read_json(folder / "model_index.json").get("boundary_ratio")
    if not isinstance(boundary, float):
        return manifest
    manifest = replace(manifest, boundary=boundary)
    check_manifest(manifest, str(folder / "model_index.json"))
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({' '.join(str(error).split())})") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return document


def _expert_of(stem: str) -> str:
    """The role a transformer's file name tells: the first word "high" or "low" in it, also as in I2VHighNoise."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", stem).lower()
    found = re.search(r"(?<![a-z])(high|low)(?:noise)?(?![a-z])", words)
    return f"{found[1]}_noise" if found else "transformer"


def _loose_files(folder: Path) -> Manifest:
    """The original repositories' way: weights of all roles side by side, told apart by their tensors."""
    candidates = sorted(folder.glob("*.index.json"))
    maps = [_read_json(index).get("weight_map") for index in candidates]
    sharded = {str(name) for shards in maps if isinstance(shards, dict) for name in shards.values()}
    candidates += sorted(p for p in folder.iterdir() if p.suffix in SAFETENSORS + PICKLED and p.name not in sharded)
    files: dict[str, Path] = {}
    for path in candidates:
        role = detect(read_tensors(path), str(path)).role
        if role == "transformer":
            role = _expert_of(path.stem)
        if role in files:
            raise CheckpointError(
                f"{folder} holds two files that can be its {role} ({files[role].name}, {path.name});"
                f" write a {FILE_NAME} or name the files"
            )
        files[role] = path
    for expert, role in (("high_noise_model", "high_noise"), ("low_noise_model", "low_noise")):
        if (folder / expert).is_dir():
            files[role] = folder / expert
    for name in ("google/umt5-xxl", "tokenizer"):
        if (folder / name).is_dir():
            files.setdefault("tokenizer", folder / name)
    if not files:
        raise CheckpointError(f"{folder} holds no weights and no {FILE_NAME}")
    return guess_manifest(folder.resolve().name, files)
