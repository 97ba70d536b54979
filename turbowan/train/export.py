"""Between training and transformer files of any family: their weights in float32, and a state's weights as a file."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch

from ..checkpoints.assign import assign
from ..checkpoints.convert import check_target, write_layout
from ..checkpoints.families import WRITERS
from ..checkpoints.files import write_tensors
from ..checkpoints.load import choose_attention, empty_transformer, outline, read
from ..checkpoints.scales import expand
from ..errors import CheckpointError, Note
from ..models.transformer import WanTransformer
from . import checkpoint

AVERAGE = "average"


def load_for_training(path: Path | str, device: torch.device | str = "cpu") -> WanTransformer:
    """A transformer of any family and size in float32, attention as the file's kind has it by default.

    A file in 8 bits is expanded, with a note: training goes on from its rounded weights.

    Raises:
        CheckpointError: the file cannot serve.
    """
    state, found = read(path, "transformer")
    if found.quantization != "none":
        note = f"{path} is {found}: its weights are expanded, and training starts from their rounded values"
        warnings.warn(note, Note, stacklevel=2)
        for key in [key for key in state if re.search(r"\.(int8_weight|weight)$", key)]:
            if state[key].itemsize == 1:
                expand(state, key.rpartition(".")[0])
    net, state = empty_transformer(state, str(path))
    net.attention = choose_attention(net.config, str(path))
    assign(net, state, device, torch.float32)
    return net


def export_transformer(
    source: Path, target: Path, to: str = "turbowan", net: str = AVERAGE, dtype: torch.dtype = torch.bfloat16
) -> list[Path]:
    """Write a trained transformer from a run's folder, or from one of its states, as a file of a checkpoint family.

    Args:
        source: the folder of a run, of which the newest state is taken, or a state's own folder `step-...`.
        target: `.safetensors` or `.pth`; for diffusers a folder, too.
        to: a key of `checkpoints.convert.LAYOUTS`.
        net: "average", the student's averaged weights, or the name of a trained net: "student", "critic"; of two
            experts one: "average.high", "student.low".
        dtype: of the written tensors.

    Returns:
        The files written.

    Raises:
        CheckpointError: there is no whole state, it has no such net, or the target cannot be written.
    """
    check_target(source, target, to)
    states = [source] if (source / ".metadata").exists() else checkpoint.saved(source)
    if not states:
        raise CheckpointError(f"{source} holds no training state (a folder step-...); name the folder of a run")
    state = checkpoint.read(states[-1], f"{net}." if net.split(".")[0] == AVERAGE else f"model.{net}.")
    model = outline(state, "transformer", str(states[-1]))
    converted = WRITERS["transformer", to]({key: value.to(dtype) for key, value in state.items()})
    return write_layout(target, to, "transformer", model, lambda path: write_tensors(path, converted))
