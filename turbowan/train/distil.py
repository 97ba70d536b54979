"""The distillation stages as commands run them: files in, training, a transformer's file out."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from ..errors import CheckpointError
from ..models.transformer import AttentionConfig, WanTransformer
from .data import Source
from .distributed import rank
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
        teacher: a transformer's file of any family, in full precision. start: another one with SLA to begin from.
        folder: keeps states, curve and result. max_minutes: of this run; run again to go on.

    Returns:
        The result's files, none while the stage is not done.

    Raises:
        CheckpointError: a file or folder cannot be used.
    """
    dense = read_trainable(teacher, device)
    dense.attention = AttentionConfig("original")
    student = with_sla(dense if start is None else read_trainable(start, device, like=dense))
    return _train(SLA(config, student, dense), source, trainer, folder, device, max_minutes)


def train_rcm(
    config: RCMConfig, trainer: TrainerConfig, teacher: Path, source: Source, folder: Path, device: torch.device,
    max_minutes: float | None = None, start: Path | None = None,
) -> list[Path]:  # fmt: skip
    """Distil a many-step teacher into a student of one to four steps; arguments as `train_sla`'s.

    The student has the attention of the file it starts from: the teacher's, or with `start` another one's, SLA too.
    With a `boundary` two experts are trained and written.
    """
    net = read_trainable(teacher, device)
    start_net = copy.deepcopy(net) if start is None else read_trainable(start, device, like=net)
    if config.sla or start_net.config.has_sla:
        start_net = with_sla(start_net)
        start_net.attention = AttentionConfig("sla", config.top_k)
    student = start_net if config.boundary is None else Experts(start_net, config.boundary)
    method = RCM(config, student, net, copy.deepcopy(net), source.negative)
    return _train(method, source, trainer, folder, device, max_minutes)


def read_trainable(path: Path, device: torch.device, like: WanTransformer | None = None) -> WanTransformer:
    """A transformer in float32, as training wants it.

    Raises:
        CheckpointError: unreadable, or its sizes are not those of `like`.
    """
    net = load_for_training(path, device)
    if like is not None:
        sizes = [(n.config.dim, n.config.ffn_dim, n.config.num_layers, n.config.in_dim) for n in (net, like)]
        if sizes[0] != sizes[1]:
            raise CheckpointError(
                f"{path} has width, hidden width, layers and channels {sizes[0]}, the teacher {sizes[1]};"
                " a student needs a teacher of its own size"
            )
    return net


def _train(
    method: Method, source: Source, trainer: TrainerConfig, folder: Path, device: torch.device,
    max_minutes: float | None,
) -> list[Path]:  # fmt: skip
    if device.type == "cuda":
        for net in (*method.trained.values(), *method.frozen.values()):
            _compile(net)
    if not run(method, source, trainer, folder, device, max_minutes).finished:
        return []
    kind = AVERAGE if trainer.ema else "student"
    results = {folder / RESULT: kind}
    if isinstance(method.trained["student"], Experts):
        results = {folder / f"{name}_noise.safetensors": f"{kind}.{name}" for name in NAMES}
    if rank() == 0:
        for path, which in results.items():
            export_transformer(folder, path, "official", which)
    return list(results)


def _compile(net: nn.Module) -> None:
    blocks = getattr(net, "blocks", [])
    for block in blocks:
        block.compile(dynamic=False)
