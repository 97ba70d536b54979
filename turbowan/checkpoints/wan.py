"""The original Wan files: a convolution as patch embedding, Wan's own names for umT5 and CLIP."""

from ..errors import CheckpointError
from .files import State
from .names import OFFICIAL_PROJ, WAN_IMAGE_ENCODER, WAN_TEXT_ENCODER, rename

PATCH = "patch_embedding.weight"


def read_transformer(state: State) -> State:
    state = {key.replace(OFFICIAL_PROJ, "self_attn.proj_l"): v for key, v in state.items()}
    if PATCH in state:
        state[PATCH] = state[PATCH].flatten(1)
    return state


def write_transformer(state: State) -> State:
    state = {key.replace("self_attn.proj_l", OFFICIAL_PROJ): value for key, value in state.items()}
    return {**state, PATCH: state[PATCH].unflatten(1, (-1, 1, 2, 2))}


def read_text_encoder(state: State) -> State:
    return rename(state, WAN_TEXT_ENCODER)


def write_text_encoder(state: State) -> State:
    return rename(state, WAN_TEXT_ENCODER, to_theirs=True)


def read_image_encoder(state: State) -> State:
    """Wan's CLIP file holds the text tower too, which is left out."""
    visual = {key: value for key, value in state.items() if key.startswith("visual.")}
    state = rename(visual, WAN_IMAGE_ENCODER)
    out = {}
    for key, value in state.items():
        if key.endswith((".attn.to_qkv.weight", ".attn.to_qkv.bias")):
            layer, kind = key.split(".")[2], key.rsplit(".", 1)[1]
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                out[f"vision_model.encoder.layers.{layer}.self_attn.{letter}_proj.{kind}"] = part
        elif key == "visual.cls_embedding":
            out["vision_model.embeddings.class_embedding"] = value.flatten()
        elif key == "visual.pos_embedding":
            out["vision_model.embeddings.position_embedding.weight"] = value.squeeze(0)
        elif key != "visual.head":
            out[key] = value
    if not out:
        raise CheckpointError("the CLIP file holds no 'visual.' tensors")
    return out
