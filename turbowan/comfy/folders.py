"""What can be chosen in a node and where it lies: ComfyUI's model folders, and the models inside this package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    from ..checkpoints.manifest import Manifest

TRANSFORMERS, VAES, TEXT_ENCODERS = "diffusion_models", "vae", "text_encoders"
# the embedded models' files by the folder they would lie in: choice -> (model, role)
EMBEDDED = {
    TRANSFORMERS: {
        "tiny": ("tiny", "transformer"),
        "tiny-base": ("tiny-base", "transformer"),
        "tiny-i2v-high": ("tiny-i2v", "high_noise"),
        "tiny-i2v-low": ("tiny-i2v", "low_noise"),
    },
    VAES: {"tiny": ("tiny", "vae")},
    TEXT_ENCODERS: {"tiny": ("tiny", "text_encoder")},
}


def choices(kind: str) -> list[str]:
    """The files of one of ComfyUI's folders, then the embedded ones. Never raises: ComfyUI would stop."""
    return [*_listed(kind), *EMBEDDED.get(kind, {})]


def vae_choices() -> list[str]:
    """The files that may be a VAE: all of the VAE folders, and those named so among the diffusion models."""
    beside = [name for name in _listed(TRANSFORMERS) if fnmatch(_plain(name).rpartition("/")[2].lower(), "*vae*")]
    return [*dict.fromkeys([*_listed(VAES), *beside]), *EMBEDDED[VAES]]


def _listed(kind: str) -> list[str]:
    try:
        import folder_paths

        return list(folder_paths.get_filename_list(kind))
    except Exception:
        return []


def check(name: object, kinds: Sequence[str], label: str) -> bool | str:
    """For VALIDATE_INPUTS: True, or what is wrong with a choice. A linked input (None) is checked when it comes."""
    if name is None:
        return True
    try:
        find(str(name), kinds, label)
    except CheckpointError as error:
        return str(error)
    return True


def find(name: str, kinds: Sequence[str], label: str) -> Path:
    """The file of a choice, which may have either system's separators, or leave a subfolder out.

    Args:
        kinds: folders to look in, in this order. label: the input's name, for the error.

    Raises:
        CheckpointError: there is no such file.
    """
    for kind in kinds:
        if name in EMBEDDED.get(kind, {}):
            return _embedded(*EMBEDDED[kind][name])
        listed = _listed(kind)
        wanted = _plain(name)
        same = [each for each in listed if _plain(each) == wanted]
        same += [each for each in listed if _plain(each).rpartition("/")[2] == wanted.rpartition("/")[2]]
        if same:
            import folder_paths

            path = folder_paths.get_full_path(kind, same[0])
            if path is not None:
                return Path(path)
    known = [each for kind in kinds for each in choices(kind)]
    raise CheckpointError(
        f"{label}: '{name}' is not among the {len(known)} files of models/{kinds[0]}"
        f" ({', '.join(known[:4])}{' …' if len(known) > 4 else ''})"
    )


@contextmanager
def naming(label: str) -> Iterator[None]:
    """Put the input's name before what is wrong with its file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{label}: {error}") from error


def _plain(name: str) -> str:
    return PureWindowsPath(name).as_posix()


def embedded_topk(name: str) -> float | None:
    """The `sla_topk` that an embedded transformer was trained for; None where the choice is a file."""
    chosen = EMBEDDED[TRANSFORMERS].get(name)
    return None if chosen is None else _manifest(chosen[0]).sla_topk


def _embedded(model: str, role: str) -> Path:
    return _manifest(model).files[role]


def _manifest(model: str) -> Manifest:
    from ..checkpoints.find import EMBEDDED as FOLDER
    from ..checkpoints.manifest import read_manifest

    return read_manifest(FOLDER / model)
