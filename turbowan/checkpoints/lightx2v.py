"""lightx2v's int8 files: Wan's names, `weight` in int8 with a `weight_scale` per output row."""

import torch

from ..errors import CheckpointError
from . import wan
from .files import State


def read_transformer(state: State) -> State:
    state = wan.read_transformer(state)
    for key, value in list(state.items()):
        if key.endswith(".weight") and value.dtype == torch.int8:
            scale = state.get(f"{key}_scale")
            if scale is None or scale.numel() != value.shape[0]:
                found = "no" if scale is None else scale.numel()
                raise CheckpointError(f"{key} is int8 with {found} scales, expected {value.shape[0]} (one a row)")
            state[f"{key}_scale"] = scale.float().reshape(-1, 1)
    return state
