"""The models that most people have, in numbers: what a machine can do with them is known before they are downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from ..errors import MachineError
from ..models.text_encoder import TextEncoder
from ..models.transformer import TransformerConfig, WanTransformer
from ..models.vae import WanVAE
from .activations import Work
from .plan import Model, make_plan
from .room import Room
from .sizes import PartSize, part_size

VIDEOS = (832, 480), (1280, 720)
UMT5_XXL = {"vocabulary": 256384, "width": 4096, "layers": 24, "heads": 64, "head_width": 64, "hidden": 10240}
_SMALL = TransformerConfig(dim=1536, ffn_dim=8960, num_layers=30, text_dim=4096, has_sla=True)
_LARGE = TransformerConfig(dim=5120, ffn_dim=13824, num_layers=40, text_dim=4096, has_sla=True)
_FROM_IMAGE = TransformerConfig(dim=5120, ffn_dim=13824, num_layers=40, text_dim=4096, in_dim=36, has_sla=True)
# name -> sizes, format of the linear layers, whether there are two experts
COMMON: dict[str, tuple[TransformerConfig, str, bool]] = {
    "1.3B": (_SMALL, "bf16", False),
    "1.3B int8": (_SMALL, "int8_row", False),
    "14B": (_LARGE, "bf16", False),
    "14B int8": (_LARGE, "int8_row", False),
    "A14B-I2V int8": (_FROM_IMAGE, "int8_row", True),
}

_WORDS = {  # beginnings of summaries, the first that fits
    "everything": "all", "all but": "no text", "parts take": "turns", "experts take": "turns", "all ": "streams",
}  # fmt: skip


@cache
def _encoders() -> tuple[PartSize, PartSize]:
    """Of umT5-xxl and the VAE, in bfloat16."""
    with torch.device("meta"):
        encoder, vae = TextEncoder(**UMT5_XXL), WanVAE()
    return part_size(encoder.bfloat16(), torch.bfloat16), part_size(vae.bfloat16(), torch.bfloat16)


@cache
def common_model(name: str, width: int = 832, height: int = 480, frames: int = 81) -> tuple[Model, Work]:
    """A model of COMMON with its encoders in bfloat16, and what a four-step request on a GPU asks of it."""
    config, format, two = COMMON[name]
    with torch.device("meta"):
        net = WanTransformer(config).bfloat16()
    size = replace(part_size(net, torch.bfloat16, format), converted=0)  # files are taken to be in it
    text, vae = _encoders()
    nets = {"high_noise": size, "low_noise": size} if two else {"transformer": size}
    model = Model(name, {**nets, "text_encoder": text, "vae": vae}, config, UMT5_XXL["width"])
    from_image = config.in_dim > config.out_dim
    return model, Work(width, height, frames, eight_bit=format != "bf16", encodes_image=from_image)


def plan_common(room: Room) -> list[dict[str, Any]]:
    """For each of COMMON and each of VIDEOS: model, size, peak (bytes, None if it does not fit) and how, or why not."""
    found = []
    for name in COMMON:
        for width, height in VIDEOS:
            model, work = common_model(name, width, height)
            entry: dict[str, Any] = {"model": name, "size": f"{width}x{height}"}
            try:
                plan = make_plan(model, work, room)
                found.append({**entry, "peak": plan.peak, "summary": plan.summary})
            except MachineError as error:
                found.append({**entry, "peak": None, "summary": str(error).partition(": ")[2]})
    return found


def table_by_card(cards: Sequence[int] = (6, 8, 12, 16, 24, 32, 48, 80), host: int = 64) -> str:
    """Markdown: what each of COMMON would do on GPUs and a host of so many GB, as budgets.

    A cell has the peak in GB and how: "all" stays on the GPU, "no text" all but the text encoder, "turns" parts come
    for their stage, or how many of the transformer's blocks stay beside those that stream.
    """
    lines = ["| model | size | " + " | ".join(f"{card} GB" for card in cards) + " |", "|---" * (2 + len(cards)) + "|"]
    plans = [plan_common(Room(card * 10**9, host * 10**9, budget=card * 10**9)) for card in cards]
    for row in zip(*plans, strict=True):
        cells = [_cell(entry) for entry in row]
        lines.append(f"| {row[0]['model']} | {row[0]['size'].replace('x', '×')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(entry: dict[str, Any]) -> str:
    if entry["peak"] is None:
        return "–"
    summary: str = entry["summary"]
    known = next((short for start, short in _WORDS.items() if summary.startswith(start)), None)
    return f"{entry['peak'] / 1e9:.1f}, {known or summary.partition(' blocks')[0].replace(' of ', '/')}"
