"""The update that one training made, added to another model: SLA tuning onto an rCM model, or T2V training onto I2V.

merged = base + weight * (diff_target - diff_base). Source: TurboDiffusion's `merge_models.py` (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.convert import LAYOUTS, check_target, write_layout
from ..checkpoints.families import WRITERS
from ..checkpoints.files import State, stream_tensors
from ..checkpoints.load import outline, read
from ..errors import CheckpointError

_SIZES = ("dim", "ffn_dim", "num_layers", "text_dim")  # of TransformerConfig: equal in models that can be merged


@dataclass(frozen=True)
class Merged:
    """What became of the tensors, by our names; `str` of it is one line.

    files: written. updated: base + weight * (diff_target - diff_base). kept: the base's own, as a diff file lacks them
    or has them in another shape. copied: diff_target's, as the base lacks them.
    """

    files: Sequence[Path]
    updated: Sequence[str]
    kept: Sequence[str]
    copied: Sequence[str]

    def __str__(self) -> str:
        def counted(names: Sequence[str]) -> str:
            return f"{len(names):,}" + (f" (e.g. {names[0]})" if names else "")

        updated, kept, copied = len(self.updated), counted(self.kept), counted(self.copied)
        return f"{updated:,} tensors updated, {kept} kept from the base, {copied} copied from the diff target"


def merge_checkpoints(
    base: Path,
    diff_base: Path,
    diff_target: Path,
    target: Path,
    weight: float = 1.0,
    to: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Merged:
    """Write base + weight * (diff_target - diff_base): float32 arithmetic, each tensor in the base's dtype.

    The three inputs are memory-mapped and may be of three families. A `.safetensors` target is written one tensor after
    another; a `.pth` one is held in memory whole before.

    Args:
        base: the model that gets the update, e.g. the rCM model, or an image-to-video expert.
        diff_base, diff_target: the model before and after the training, e.g. Wan 2.1 and the SLA-tuned Wan 2.1.
        target: `.safetensors` or `.pth`; for diffusers a folder, too.
        weight: of the update; any finite number, 1 for the whole of it.
        to: a key of `checkpoints.convert.LAYOUTS`; the base's own layout by default.
        progress: called with the number of tensors done and their total.

    Raises:
        CheckpointError: an input is unreadable, incomplete, no transformer, in 8 bits or of another size than the base;
            the update is not finite; the target cannot be written. Nothing is written then.
    """
    if not math.isfinite(weight):
        raise CheckpointError(f"the weight of the update must be a finite number, got {weight}")
    if diff_base.resolve() == diff_target.resolve():
        raise CheckpointError(f"diff base and diff target are both {diff_base}: there is no update between them")
    files = (base, diff_base, diff_target)
    states, (family, *_) = zip(*(_read_full_precision(file) for file in files), strict=True)
    to = to or (family if family in LAYOUTS else "wan")  # lightx2v has Wan's names
    for file in files:
        check_target(file, target, to)
    _check_sizes(files, states)
    own, before, after = states

    copied = [key for key in after if key not in own]
    updated = [key for key in own if _shape(before, key) == own[key].shape == _shape(after, key)]
    kept = sorted(set(own) - set(updated))
    plain = {**own, **{key: after[key] for key in copied}}
    layout = {key: value.to("meta") for key, value in plain.items()}
    model = outline(layout, "transformer", "the merged model")
    # A transformer's writer renames and reshapes, each tensor to one and in order: so they can be made one by one.
    theirs = list(WRITERS["transformer", to](layout).items())

    def merged() -> Iterator[tuple[str, Tensor]]:
        changed = frozenset(updated)
        for done, ((key, value), (name, shape)) in enumerate(zip(plain.items(), theirs, strict=True), start=1):
            if key in changed:
                value = _update(key, value, before[key], after[key], weight)
            yield name, value.reshape(shape.shape)
            progress(done, len(theirs))

    written = write_layout(target, to, "transformer", model, lambda path: stream_tensors(path, dict(theirs), merged()))
    return Merged(written, updated, kept, copied)


def _read_full_precision(path: Path) -> tuple[State, str]:
    """A transformer under our names, and its family."""
    state, found = read(path, "transformer")
    if found.quantization != "none":
        raise CheckpointError(
            f"{path} is {found}: an update is lost in their rounding; merge full-precision files, then quantise"
        )
    return state, found.family


def _check_sizes(files: Sequence[Path], states: Sequence[State]) -> None:
    """Refuse incomplete files, and models of several sizes."""
    configs = [outline(state, "transformer", str(file)).config for file, state in zip(files, states, strict=True)]
    sizes = [tuple(getattr(config, name) for name in _SIZES) for config in configs]
    for file, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            listed = [f"width {d}, hidden {h}, {n} blocks, text {t}" for d, h, n, t in (size, sizes[0])]
            raise CheckpointError(
                f"{file} ({listed[0]}) is of another size than the base {files[0]} ({listed[1]});"
                " an update fits only models of one size"
            )


def _shape(state: State, key: str) -> torch.Size | None:
    return state[key].shape if key in state else None


def _update(key: str, base: Tensor, before: Tensor, after: Tensor, weight: float) -> Tensor:
    result = (base.float() + weight * (after.float() - before.float())).to(base.dtype)
    if not bool(result.isfinite().all()):
        bad = int((~result.isfinite()).sum())
        raise CheckpointError(
            f"{key}: {bad:,} of {result.numel():,} merged values are NaN or Inf in {str(base.dtype).split('.')[1]};"
            f" an input is damaged, or the weight {weight:g} is too large"
        )
    return result
