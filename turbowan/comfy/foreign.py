"""CONDITIONING in the form that an older pack's nodes put in its place."""

from __future__ import annotations

from typing import Any

from ..errors import RequestError

TEXT, KNOWN = "crossattn_emb", "y_B_C_T_H_W"


def core_form(conditioning: Any, label: str) -> list:
    """ComfyUI's own form, [text [1, rows, width], values], of every entry.

    The older form has a dictionary for the text: TEXT, and perhaps KNOWN, the start picture as the network gets it:
    [1, 20, T, h, w], 4 channels of a mask that is 1 where the picture is, then 16 of a normalised latent.

    Args:
        label: the node's input, for the error.

    Raises:
        RequestError: it is neither.
    """
    made = []
    for first, values in conditioning:
        text = first
        if isinstance(first, dict):
            text = first.get(TEXT)
            if first.get(KNOWN) is not None:
                values = {**values, **_start_picture(first[KNOWN])}
        shape = getattr(text, "shape", None)
        if shape is None or len(shape) != 3:
            got = type(text).__name__ if shape is None else list(shape)
            raise RequestError(f"{label}: the text in it is a tensor [1, rows, width], got {got}")
        made.append([text, values])
    if not made:
        raise RequestError(f"{label}: there is nothing in it; link CLIPTextEncode")
    return made


def _start_picture(known: Any) -> dict[str, Any]:
    """`concat_latent_image` and `concat_mask` of KNOWN."""
    from comfy.latent_formats import Wan21

    return {
        "concat_latent_image": Wan21().process_out(known[:, 4:].float()),
        "concat_mask": 1 - known[:, :1].float(),
    }
