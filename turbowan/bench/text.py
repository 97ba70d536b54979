"""The umT5 encoder of true size on a GPU, with random weights made there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..checkpoints.detect import detect
from ..checkpoints.families import READERS
from ..checkpoints.load import empty_text_encoder
from ..checkpoints.scales import read_scales
from ..errors import RequestError
from ..models.text_encoder import TextEncoder, TextSizes
from .case import Case
from .host import host_facts
from .op import time_case
from .random_weights import TEXT_ENCODERS, TEXT_FORMATS, draw_state, text_layout


def run_text(format: str, tokens: Sequence[int], repeats: int = 10) -> Iterator[dict[str, Any]]:
    """One record per length of prompt: median, rate at which the weights are read, and what the host has to do.

    Args:
        format: of the weights, one of TEXT_FORMATS. tokens: lengths.

    Raises:
        RequestError: an unknown format, or no GPU.
    """
    if format not in TEXT_FORMATS:
        raise RequestError(f"the text encoder's format must be one of {', '.join(TEXT_FORMATS)}, got '{format}'")
    if not torch.cuda.is_available():
        raise RequestError("bench text needs a CUDA device; there is none here")
    sizes = TEXT_ENCODERS["xxl"]
    with torch.inference_mode():
        encoder = random_encoder(sizes, format, torch.device("cuda"))
        read = sum(w.nbytes for w in (*encoder.parameters(), *encoder.buffers())) - encoder.model.shared.weight.nbytes
        for length in tokens:
            ids = torch.randint(2, sizes.vocabulary, (1, length), device="cuda")
            flops = 2 * length * (read // (2 if format == "bf16" else 1))

            def run(ids: torch.Tensor = ids) -> torch.Tensor:
                return encoder(ids)  # type: ignore[no-any-return]

            case = Case(f"umt5-xxl {format} {length} tokens", run, {"tokens": length}, flops, read)
            record = time_case(case, repeats)
            if "ms" in record:
                record |= host_facts(run)
            yield {"bench": "text", "case": case.name, "format": format, **record}


def random_encoder(sizes: TextSizes, format: str, device: torch.device) -> TextEncoder:
    """On a device, in bfloat16."""
    state = draw_state(text_layout(sizes, format), device, seed=0)
    reader = READERS["text_encoder", detect(state).family]
    encoder, state = empty_text_encoder(read_scales(reader(state)), "the random encoder")
    encoder.model.load_state_dict({key: value.to(device) for key, value in state.items()}, assign=True)
    return encoder.eval().requires_grad_(False)
