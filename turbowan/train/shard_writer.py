"""Writing latent shards: whole ones only, so that a run can stop at any moment and go on."""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.files import make_folder, replacing
from ..errors import CheckpointError
from .distributed import rank, world_size
from .shards import SUFFIXES, Sample, Shapes, Shards, check_sample, member_name, scan_tar


def write_shards(
    make: Callable[[range], Iterable[Sample]],
    count: int,
    folder: Path,
    per_shard: int = 256,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write clips 0..count-1 as `shard_000000.tar` and so on, in bfloat16; shards that are there are not made again.

    Each is written beside its place and renamed when whole: a run killed at any moment goes on with the shard it was
    at, and a larger `count` makes a short last shard anew. Under torchrun the processes take turns, shard by shard.

    Args:
        make: yields the clips of the given numbers, in order. The same number must always give the same clip.
        per_shard: clips in each shard but the last.
        progress: called with the number up to which this process is done, and `count`.

    Returns:
        All shards, those that were there included.

    Raises:
        CheckpointError: a shard in the folder is damaged or holds other numbers; a clip has NaN, Inf or another shape
            than the first; the place cannot be written.
    """
    if count < 1 or per_shard < 1:
        raise CheckpointError(f"at least one clip must be written, and one a shard; got {count} and {per_shard}")
    make_folder(folder)
    paths = [folder / f"shard_{shard:06d}.tar" for shard in range(math.ceil(count / per_shard))]
    shapes: Shapes = {}
    for shard in range(rank(), len(paths), world_size()):
        path, numbers = paths[shard], range(shard * per_shard, min(count, (shard + 1) * per_shard))
        if path.exists() and _is_written(path, numbers):
            shapes = shapes or Shards(path).shapes
            progress(numbers.stop, count)
            continue
        with replacing(path) as partial, tarfile.open(partial, "w") as tar:
            for number, sample in zip(numbers, make(numbers), strict=True):
                shapes = _add(tar, path, f"{number:09d}", sample, shapes)
                progress(number + 1, count)
    return paths


def _is_written(path: Path, numbers: range) -> bool:
    """Whether a shard holds these clips; False where it holds only the first of them."""
    found, wanted = [key for key, _ in scan_tar(path)], [f"{number:09d}" for number in numbers]
    if found != wanted[: len(found)]:
        raise CheckpointError(
            f"{path} holds clips {found[0]} to {found[-1]}, not {wanted[0]} to {wanted[-1]}: it was written with"
            " another number of clips a shard; give another folder"
        )
    return len(found) == len(wanted)


def _add(tar: tarfile.TarFile, path: Path, key: str, sample: Sample, shapes: Shapes) -> Shapes:
    """Append a clip that fits the first one's shapes; returns these."""
    check_sample(sample, lambda member: member_name(path, key, member), shapes)
    for member, suffix in SUFFIXES.items():
        value = getattr(sample, member)
        if value is None:
            continue
        data = _saved(value) if isinstance(value, Tensor) else value.encode()
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return shapes or sample.shapes()


def _saved(value: Tensor) -> bytes:
    buffer = io.BytesIO()
    alone = torch.empty(value.shape, dtype=torch.bfloat16)  # torch.save writes the whole storage behind a view
    torch.save(alone.copy_(value.detach()), buffer)
    return buffer.getvalue()
