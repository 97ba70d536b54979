"""Files of `diffusers`: `transformer/`, `vae/` folders with their own names."""

from .detect import strip_prefixes
from .files import State
from .names import DIFFUSERS_TRANSFORMER, DIFFUSERS_VAE, rename
from .wan import PATCH


def read_transformer(state: State) -> State:
    state = {key.replace(".attn1.attn_impl.", ".attn1.attn_op.local_attn."): v for key, v in strip_prefixes(state).items()}
    state = rename(state, DIFFUSERS_TRANSFORMER)
    if PATCH in state and state[PATCH].ndim == 5:
        state[PATCH] = state[PATCH].flatten(1)
    return state


def write_transformer(state: State) -> State:
    state = rename(state, DIFFUSERS_TRANSFORMER, to_theirs=True)
    return {**state, PATCH: state[PATCH].unflatten(1, (-1, 1, 2, 2))}


def read_vae(state: State) -> State:
    return rename(state, DIFFUSERS_VAE)


def write_vae(state: State) -> State:
    return rename(state, DIFFUSERS_VAE, to_theirs=True)


def read_text_encoder(state: State) -> State:
    """`transformers` ties the input embedding: files hold it under one name or both."""
    state = dict(state)
    embedding = state.pop("encoder.embed_tokens.weight", None)
    if embedding is not None:
        state.setdefault("shared.weight", embedding)
    return state


def write_text_encoder(state: State) -> State:
    return dict(state)
