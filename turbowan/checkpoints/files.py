"""Reading and writing tensor files: `.safetensors`, `.pth`, sharded sets. No pickled code ever runs."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError

State = dict[str, Tensor]

SAFETENSORS = (".safetensors", ".sft")
PICKLED = (".pth", ".pt", ".ckpt", ".bin")
_NESTED = ("state_dict", "model", "module")  # where training tools put the tensors inside a .pth


def read_tensors(path: Path) -> State:
    """All tensors of a file, a sharded set's index, or a folder that holds one of these; memory-mapped on the CPU.

    Raises:
        CheckpointError: missing, empty, truncated, of another format, or holding more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; check the path or run 'turbowan download'")
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes); download it again")
    if path.suffix == ".json":
        return _read_sharded(path)
    if path.suffix in SAFETENSORS:
        return _read_safetensors(path, size)
    if path.suffix in PICKLED:
        return _read_pickled(path, size)
    known = " ".join(SAFETENSORS + PICKLED)
    raise CheckpointError(f"{path} ends in '{path.suffix}'; weights end in one of {known}")


def _weights_in(folder: Path) -> Path:
    """The one set of weights in a folder, an index before single files."""
    found = sorted(folder.glob("*.index.json")) or sorted(
        p for p in folder.iterdir() if p.suffix in (*SAFETENSORS, *PICKLED)
    )
    if len(found) != 1:
        names = ", ".join(p.name for p in found[:4]) or "none"
        raise CheckpointError(f"{folder} holds {len(found)} weight files ({names}); name one of them")
    return found[0]


def _read_safetensors(path: Path, size: int) -> State:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} ({size:,} bytes) is not a readable .safetensors file ({_one_line(error)}); download it again"
        ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The header's metadata of a `.safetensors` file; empty for other files."""
    if path.suffix not in SAFETENSORS:
        return {}
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable .safetensors file ({_one_line(error)})") from error


def _read_pickled(path: Path, size: int) -> State:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} ({size:,} bytes) holds pickled objects other than tensors, or is damaged;"
            f" only plain tensor files are read, never code ({_one_line(error)})"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} ({size:,} bytes) is not a readable PyTorch file ({_one_line(error)}); download it again"
        ) from error
    for key in _NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a mapping of names to tensors")
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors (keys: {', '.join(map(str, list(loaded)[:4])) or 'none'})")
    return tensors


def _read_sharded(index: Path) -> State:
    try:
        shards = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not a shard index with a 'weight_map' ({_one_line(error)})") from error
    state: State = {}
    names = sorted(set(shards.values()))
    for name in names:
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index.name} names {len(names)} shards; {name} is missing from {index.parent}")
        state.update(read_tensors(index.parent / name))
    missing = sorted(set(shards) - set(state))
    if missing:
        raise CheckpointError(f"{index} lists {len(missing)} tensors its shards lack, e.g. {missing[0]}")
    return state


def write_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `.safetensors` or `.pth`, by the suffix, beside the target first and renamed when whole.

    Raises:
        CheckpointError: unknown suffix, or the place cannot be written.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with replacing(path) as partial:
        if path.suffix in SAFETENSORS:
            separate = {k: v.clone() if v.untyped_storage().nbytes() != v.nbytes else v for k, v in tensors.items()}
            save_file(separate, str(partial), metadata=dict(metadata) if metadata else None)
        elif path.suffix in PICKLED:
            torch.save({k: v.clone() for k, v in tensors.items()}, partial)
        else:
            raise CheckpointError(f"cannot write {path}: weights end in one of {' '.join(SAFETENSORS + PICKLED)}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside the target to write to; it takes the target's place at the end, or is removed on any error."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
