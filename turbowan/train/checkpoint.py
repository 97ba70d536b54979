"""Training states on the disk: PyTorch's distributed checkpoints (DCP), a folder each, written beside, then renamed.

A state is a flat mapping of names to tensors, plain or sharded. Any number of processes reads what any other number
wrote.
"""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from ..checkpoints.files import State
from ..errors import CheckpointError
from .distributed import rank, wait_for_all

KEPT = 2  # states in a folder
_NAME = re.compile(r"step-(\d+)")


def saved(folder: Path) -> list[Path]:
    """The whole states in a run's folder, oldest first."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def save(folder: Path, step: int, state: State) -> Path:
    """Write a state and drop all but the last two. A kill at any moment leaves the last whole one as it was.

    Called by all processes at once.

    Raises:
        CheckpointError: it cannot be written, e.g. the disk is full; on all processes.
    """
    path = folder / f"step-{step:08d}"
    partial = folder / f".{path.name}.part"
    if rank() == 0:
        for left in folder.glob(".step-*.part"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
    wait_for_all()
    try:
        with _one_line(f"cannot write {path}"):
            dcp.save(state, checkpoint_id=partial)
            if rank() == 0:
                partial.rename(path)
    except CheckpointError as error:
        size = sum(value.numel() * value.itemsize for value in state.values()) / 1e6
        free = shutil.disk_usage(folder).free / 1e6
        shutil.rmtree(partial, ignore_errors=True)
        before = [f"; {kept.name} is whole, and the next run goes on from it" for kept in saved(folder)[-1:]]
        raise CheckpointError(f"{error}: {size:,.1f} MB to write, {free:,.1f} MB free{''.join(before)}") from error
    if rank() == 0:
        for old in saved(folder)[:-KEPT]:
            shutil.rmtree(old.rename(folder / f".{old.name}.part"), ignore_errors=True)
    wait_for_all()
    return path


def load(path: Path, state: State) -> None:
    """Read a state into the tensors given, in place, however they are sharded. Called by all processes at once.

    Raises:
        CheckpointError: damaged, or of other names or shapes.
    """
    with _one_line(f"{path} is not a state of this run", "; give another folder, or remove this state"):
        dcp.load(state, storage_reader=_Reader(path))


def read(path: Path, prefix: str) -> State:
    """The tensors whose names start with a prefix, without it; in one process, whichever number wrote them.

    Raises:
        CheckpointError: damaged, or nothing is named so.
    """
    with _one_line(f"{path} is not a training state"):
        reader = _Reader(path)
        state = {
            key: torch.empty(facts.size, dtype=facts.properties.dtype)
            for key, facts in reader.read_metadata().state_dict_metadata.items()
            if isinstance(facts, TensorStorageMetadata) and key.startswith(prefix)
        }
        dcp.load(state, storage_reader=reader, no_dist=True)
    if not state:
        raise CheckpointError(f"{path} holds nothing named {prefix}")
    return {key.removeprefix(prefix): value for key, value in state.items()}


@contextmanager
def _one_line(what: str, then: str = "") -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: as meant
            yield
    except (CheckpointException, Exception) as error:  # the first is no Exception; a damaged file can raise anything
        failures = error.failures if isinstance(error, CheckpointException) else {}
        cause = next((failure[0] for failure in failures.values()), error)
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if isinstance(cause.__context__, OSError):  # behind what PyTorch's writer says of a file it could not end
            cause = cause.__context__
        reason = " ".join(str(cause).split())[:160] or type(cause).__name__
        raise CheckpointError(f"{what} ({reason}){then}") from error


class _Reader(dcp.FileSystemReader):
    """Reads DCP's folders without running pickled code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            index = _IndexUnpickler(file).load()
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class _IndexUnpickler(pickle.Unpickler):
    """Of the index beside the tensors, which DCP pickles: it may name only what describes plain tensors."""

    _FORMAT = "torch.distributed.checkpoint"
    KNOWN = frozenset({
        (f"{_FORMAT}.metadata", "Metadata"), (f"{_FORMAT}.metadata", "MetadataIndex"),
        (f"{_FORMAT}.metadata", "StorageMeta"), (f"{_FORMAT}.metadata", "TensorStorageMetadata"),
        (f"{_FORMAT}.metadata", "ChunkStorageMetadata"), (f"{_FORMAT}.metadata", "TensorProperties"),
        (f"{_FORMAT}.metadata", "_MEM_FORMAT_ENCODING"), (f"{_FORMAT}.filesystem", "_StorageInfo"),
        ("torch", "Size"), ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib._local", "PosixPath"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index names {module}.{name}, which no list of tensors needs")
