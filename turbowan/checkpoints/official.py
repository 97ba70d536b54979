"""TurboDiffusion's files: a linear patch embedding, SLA's projection deep inside, int8 blocks in the `-quant` ones."""

from .files import State
from .names import OFFICIAL_PROJ


def read_transformer(state: State) -> State:
    return {key.replace(OFFICIAL_PROJ, "self_attn.proj_l"): value for key, value in state.items()}


def write_transformer(state: State) -> State:
    return {key.replace("self_attn.proj_l", OFFICIAL_PROJ): value for key, value in state.items()}
