"""Clips as latents on disk: the WebDataset shards of TurboDiffusion's trainers, read at random.

A shard is a plain tar. Clip n is `NNNNNNNNN.latent.pt` (a tensor [16, T, h, w]), `NNNNNNNNN.embed.pt` ([L, D]) and
`NNNNNNNNN.prompt.txt` (UTF-8); ours may have a `NNNNNNNNN.condition.pt` ([20, T, h, w]) for image-to-video.
"""

from __future__ import annotations

import glob
import io
import posixpath
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError

SUFFIXES = {"latent": "latent.pt", "text": "embed.pt", "prompt": "prompt.txt", "condition": "condition.pt"}
_COLUMN = {member: column for column, member in enumerate(SUFFIXES)}
_LAYOUT = {"latent": "[16, T, h, w]", "text": "[L, D]", "condition": "[20, T, h, w]"}
_CHANNELS = {"latent": 16, "condition": 20}
_NOWHERE = (-1, 0)  # the place of a member that a clip does not have

Places = Sequence[tuple[int, int]]  # first byte and number of bytes of a clip's members, in the order of SUFFIXES
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sample:
    """One clip. Tensors are bfloat16 in shards.

    latent: [16, T, h, w], normalised. text: [L, D], the first of 512 rows; those it leaves out are zero. condition:
    [20, T, h, w] (4 mask channels, then 16 of the image latent) for image-to-video.
    """

    latent: Tensor
    text: Tensor
    prompt: str
    condition: Tensor | None = None

    def shapes(self) -> Shapes:
        tensors = {member: getattr(self, member) for member in _LAYOUT}
        return {member: tuple(value.shape) for member, value in tensors.items() if value is not None}


class Shards:
    """The clips of many tars, by number; each is read when asked for, from any thread.

    Args:
        paths: a tar, a folder of tars, a pattern with `*`, or several of these.
        frames: keep only the first so many latent frames (the official `state_t`); all by default.

    Raises:
        CheckpointError: no tars or no clips in them, a tar that is cut off or none, a clip without one of its members,
            or a first clip that cannot be read.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], frames: int | None = None) -> None:
        if frames is not None and frames < 1:
            raise CheckpointError(f"at least one latent frame must be kept, got {frames}")
        self.files = find_tars([paths] if isinstance(paths, (str, Path)) else paths)
        self.frames = frames
        with ThreadPoolExecutor(8) as pool:  # a network file system answers many at once
            scans = list(pool.map(scan_tar, self.files))
        self.keys = [key for scan in scans for key, _ in scan]
        if not self.keys:
            where = f"{self.files[0]}{f' and {len(self.files) - 1} more' if len(self.files) > 1 else ''}"
            raise CheckpointError(f"there are no clips in {where}: no names end in {SUFFIXES['latent']}")
        self._file = np.repeat(np.arange(len(scans)), [len(scan) for scan in scans])
        self._places = np.array([places for scan in scans for _, places in scan], dtype=np.int64)  # [N, 4, 2]
        conditions = self._places[:, _COLUMN["condition"], 0] >= 0
        self.has_condition = bool(conditions[0])
        unlike = np.flatnonzero(conditions != self.has_condition)
        if len(unlike):
            raise CheckpointError(_unlike_the_first(self.name(int(unlike[0]), "condition"), self.has_condition))
        self.shapes: Shapes = {}
        self.shapes = self[0].shapes()  # those of all the others

    def __len__(self) -> int:
        return len(self.keys)

    def __str__(self) -> str:
        listed = ", ".join(f"{member} {'x'.join(map(str, shape))}" for member, shape in self.shapes.items())
        return f"{len(self):,} clips in {len(self.files):,} shards: {listed}"

    def __getitem__(self, number: int) -> Sample:
        """Read one clip, 0..N-1, checked.

        Raises:
            CheckpointError: a damaged or non-finite tensor, or a shape that differs from the first clip's.
        """
        try:
            prompt = self._read(number, "prompt").decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.name(number, 'prompt')} is not UTF-8; write it again") from error
        condition = self._tensor(number, "condition") if self.has_condition else None
        sample = Sample(self._tensor(number, "latent"), self._tensor(number, "text"), prompt, condition)
        check_sample(sample, lambda member: self.name(number, member), self.shapes)
        return sample

    def name(self, number: int, member: str) -> str:
        """How an error calls a clip's "latent", "text", "prompt" or "condition": its shard and its name in there."""
        return member_name(self.files[self._file[number]], self.keys[number], member)

    def _read(self, number: int, member: str) -> bytes:
        start, size = self._places[number, _COLUMN[member]].tolist()
        path = self.files[self._file[number]]
        try:
            with path.open("rb") as file:
                file.seek(start)
                data = file.read(size)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        if len(data) != size:
            raise CheckpointError(f"{self.name(number, member)} is cut off after {len(data):,} of {size:,} bytes")
        return data

    def _tensor(self, number: int, member: str) -> Tensor:
        value = read_tensor(self._read(number, member), self.name(number, member))
        if self.frames is None or member == "text" or value.ndim != 4:
            return value
        if value.shape[1] < self.frames:
            has = f"{value.shape[1]} latent frames"
            raise CheckpointError(f"{self.name(number, member)} has {has}, fewer than the {self.frames} to be kept")
        return value[:, : self.frames]


def read_tensor(source: bytes | Path, name: str) -> Tensor:
    """The one tensor of a `.pt` file or its bytes, on the CPU.

    Raises:
        CheckpointError: it is damaged, or something else; `name` is how it is called.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        value = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise CheckpointError(f"{name} is not a readable tensor ({reason}); write it again") from error
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{name} holds a {type(value).__name__}, not a tensor")
    return value


def check_sample(sample: Sample, name: Callable[[str], str], shapes: Shapes) -> None:
    """See that a clip's tensors are finite, floating-point and of the right shapes.

    Args:
        name: how an error calls a member. shapes: those of the first clip; none for that clip itself.

    Raises:
        CheckpointError: they are not.
    """
    own = sample.shapes()
    if shapes and own.keys() != shapes.keys():
        raise CheckpointError(_unlike_the_first(name("condition"), "condition" in shapes))
    for member, shape in own.items():
        value: Tensor = getattr(sample, member)
        layout = _LAYOUT[member]
        if value.ndim != 1 + layout.count(",") or shape[0] != _CHANNELS.get(member, shape[0]) or not value.numel():
            raise CheckpointError(f"{name(member)} has shape {list(shape)}, expected {layout}")
        if shapes and shape != shapes[member]:
            first = list(shapes[member])
            raise CheckpointError(f"{name(member)} has shape {list(shape)}, the first clip's is {first}; make it anew")
        if not value.is_floating_point():
            raise CheckpointError(f"{name(member)} is {str(value.dtype).removeprefix('torch.')}, expected bfloat16")
        # NaN comes through aminmax(), which takes a fortieth of the time of isfinite()
        if not all(bool(end.isfinite()) for end in value.aminmax()):
            bad = f"{int((~value.isfinite()).sum()):,} NaN or Inf among {value.numel():,} values"
            raise CheckpointError(f"{name(member)} holds {bad}; make the clip again, or leave the shard out")
    if sample.condition is not None and sample.condition.shape[1:] != sample.latent.shape[1:]:
        sizes = [list(tensor.shape[1:]) for tensor in (sample.condition, sample.latent)]
        raise CheckpointError(f"{name('condition')} is of size {sizes[0]}, its latent of {sizes[1]}: they must agree")


def _unlike_the_first(name: str, first_has_it: bool) -> str:
    there, first = ("is missing", "has one") if first_has_it else ("is there", "has none")
    return f"{name} {there}, and the first clip {first}: all clips need one, or none"


def member_name(path: Path, key: str, member: str) -> str:
    """How an error calls a member of a clip: its shard, and its name in there."""
    return f"{path}: {key}.{SUFFIXES[member]}"


def find_tars(paths: Sequence[str | Path]) -> list[Path]:
    """The tars that files, folders and patterns name, in this order; those of one folder or pattern by name.

    One that is named twice, such as by a folder and a pattern, counts once.

    Raises:
        CheckpointError: one of them names none.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        pattern = f"{glob.escape(str(path))}/*.tar" if path.is_dir() else str(path)  # no hidden, half-written ones
        names = [str(path)] if path.is_file() else glob.glob(pattern)
        if not names:
            raise CheckpointError(f"there is no .tar shard at {path}; give a file, a folder or a pattern with *")
        for name in map(Path, sorted(names)):
            found.setdefault(name.resolve(), name)
    if not found:
        raise CheckpointError("no shards are given; name a file, a folder or a pattern with *")
    return list(found.values())


def scan_tar(path: Path) -> list[tuple[str, Places]]:
    """Key and places of each clip of a tar, from the headers alone.

    As for WebDataset, members of one key that follow one another are a clip; which folder they are in does not count.

    Raises:
        CheckpointError: the tar is cut off, damaged or compressed, or a clip lacks a member.
    """
    clips: list[tuple[str, dict[str, tuple[int, int]]]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                key, _, suffix = posixpath.basename(info.name).partition(".")
                if suffix not in SUFFIXES.values() or not info.isfile():
                    continue
                if not clips or clips[-1][0] != key or suffix in clips[-1][1]:
                    clips.append((key, {}))
                clips[-1][1][suffix] = (info.offset_data, info.size)
            end = tar.offset
        with path.open("rb") as file:  # tarfile takes any damaged header for the end; the true one is a block of zeros
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header at byte {end:,} of {path.stat().st_size:,}")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = f"after {len(clips):,} clips: {' '.join(str(error).split())[:100]}"
        raise CheckpointError(f"{path} is cut off, damaged or no plain tar ({reason}); get it again") from error
    for key, members in clips:
        for member in ("latent", "text", "prompt"):
            if SUFFIXES[member] not in members:
                name = member_name(path, key, member)
                raise CheckpointError(f"{name} is missing; make the clip again, or leave the shard out")
    return [(key, [members.get(suffix, _NOWHERE) for suffix in SUFFIXES.values()]) for key, members in clips]
