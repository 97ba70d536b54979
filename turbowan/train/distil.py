"""The distillation stages as commands run them: files in, training, a transformer's file out."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.load import read, transformer_config
from ..errors import CheckpointError
from ..models.transformer import AttentionConfig, WanTransformer
from .data import Source
from .distributed import blocks_of, rank, rows_of_rank
from .experts import NAMES, Experts
from .export import AVERAGE, export_transformer, load_for_training
from .rcm import RCM, RCMConfig
from .sla import SLA, SLAConfig, with_sla
from .trainer import Method, TrainerConfig, run

RESULT = "transformer.safetensors"


def train_sla(
    config: SLAConfig, trainer: TrainerConfig, teacher: Path, source: Source, folder: Path, device: torch.device,
    max_minutes: float | None = None, start: Path | None = None,
) -> list[Path]:  # fmt: skip
    """Align a network with SLA to the dense one it was.

    Args:
        config, trainer: of the losses, and of the loop.
        teacher: a transformer's file of any family. start: another one to begin from, with SLA or without.
        source: of batches that fit the teacher.
        folder: keeps states, curve and result. device: of this process.
        max_minutes: of this run; run again to go on.

    Returns:
        The result's files in the official layout, none while the stage is not done.

    Raises:
        CheckpointError: a file or folder cannot be used, or teacher, start and data do not fit together.
        MachineError: the batch cannot be split evenly over the processes.
    """
    _check(teacher, source, trainer)
    dense = _read(teacher)
    dense.attention = AttentionConfig("original")
    student = with_sla(copy.deepcopy(dense) if start is None else _read(start, like=dense))
    facts = _facts("sla", config, teacher, start)
    return _train(SLA(config, student, dense), source, trainer, folder, device, max_minutes, facts)


def train_rcm(
    config: RCMConfig, trainer: TrainerConfig, teacher: Path, source: Source, folder: Path, device: torch.device,
    max_minutes: float | None = None, start: Path | None = None,
) -> list[Path]:  # fmt: skip
    """Distil a many-step teacher into a student of one to four steps; arguments as `train_sla`'s.

    The student has the attention of the file it starts from: the teacher's, or with `start` another one's, SLA too.
    With a `boundary` two experts are trained and written.
    """
    _check(teacher, source, trainer)
    net = _read(teacher)
    first = copy.deepcopy(net) if start is None else _read(start, like=net)
    first = with_sla(first) if config.sla else first
    for each in (net, first):
        if each.config.has_sla:
            each.attention = AttentionConfig("sla", config.top_k)
    student = first if config.boundary is None else Experts(first, config.boundary)
    critic = copy.deepcopy(net) if config.score_weight else net
    method, facts = RCM(config, student, net, critic, source.negative), _facts("rcm", config, teacher, start)
    return _train(method, source, trainer, folder, device, max_minutes, facts)


def _check(teacher: Path, source: Source, trainer: TrainerConfig) -> None:
    """See that teacher and data fit together and the batch fits the processes, before anything large is done."""
    rows_of_rank(trainer.batch, trainer.accumulate)
    config = transformer_config(read(teacher, "transformer")[0], str(teacher))
    if config.image_dim is not None:
        raise CheckpointError(
            f"{teacher} takes CLIP tokens (Wan 2.1 image-to-video), which training does not have;"
            " text-to-video and Wan 2.2 image-to-video can be trained"
        )
    wanted, given = (config.text_dim, config.in_dim - config.out_dim), (source.text_dim, source.condition_channels)
    if wanted != given:
        raise CheckpointError(
            f"{teacher} takes texts of width {wanted[0]} and {wanted[1]} condition channels;"
            f" the data has {given[0]} and {given[1]}"
        )
    _ = source.negative


def _read(path: Path, like: WanTransformer | None = None) -> WanTransformer:
    """A transformer in float32 on the CPU; on processes other than the first, its shape alone (`place` fills it).

    Raises:
        CheckpointError: unreadable, or its sizes are not those of `like`.
    """
    net = load_for_training(path, "cpu" if rank() == 0 else "meta")
    if like is not None:
        mine, theirs = (asdict(replace(n.config, has_sla=False)) for n in (net, like))
        differ = ", ".join(f"{name} {mine[name]} and {theirs[name]}" for name in mine if mine[name] != theirs[name])
        if differ:
            raise CheckpointError(f"{path} is of another size than the teacher ({differ}); take one of the same size")
    return net


def _facts(stage: str, config: SLAConfig | RCMConfig, teacher: Path, start: Path | None) -> dict[str, Any]:
    """What a folder must hold for a run to go on in it."""
    files = {"teacher": teacher, "init": start}
    names = {role: path and {"name": path.name, "bytes": path.stat().st_size} for role, path in files.items()}
    return {"stage": stage, stage: asdict(config), **names}


def _train(
    method: Method, source: Source, trainer: TrainerConfig, folder: Path, device: torch.device,
    max_minutes: float | None, facts: dict[str, Any],
) -> list[Path]:  # fmt: skip
    if device.type == "cuda":
        for net in (*method.trained.values(), *method.frozen.values()):
            for block in blocks_of(net):
                block.compile(dynamic=False)
    if not run(method, source, trainer, folder, device, max_minutes, facts).finished:
        return []
    kind = AVERAGE if trainer.ema else "student"
    results = {folder / RESULT: kind}
    if isinstance(method.trained["student"], Experts):
        results = {folder / f"{name}_noise.safetensors": f"{kind}.{name}" for name in NAMES}
    if rank() == 0:
        for path, which in results.items():
            export_transformer(folder, path, "official", which)
    return list(results)
