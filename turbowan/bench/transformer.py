"""One evaluation of the transformer at true size, with random weights made on the GPU: a step of the denoise time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from ..models.pack import join_qkv, round_linears
from ..models.transformer import HEAD_SIZE, AttentionConfig, TransformerConfig, WanTransformer
from ..ops.block_map import kept_blocks
from .case import Case
from .host import graph_facts, host_facts
from .op import PEAKS, time_case
from .random_weights import TRANSFORMERS
from .step import Step

PRECISIONS = {"bf16": "bf16", "int8": "int8_row", "fp8": "fp8_row", "int8_block": "int8_block"}


def run_transformer(
    size: str,
    steps: Sequence[Step],
    precision: str = "int8",
    attention: str = "sla",
    text_rows: int = 512,
    repeats: int = 10,
    graph: bool = False,
) -> Iterator[dict[str, Any]]:
    """One record per step, all of one set of weights: median, share of the bound, and what the host has to do for it.

    Args:
        size: "1.3B", "14B", or "A14B-I2V", which is 14B with 36 channels.
        precision: of the linear layers, a key of PRECISIONS. attention: "original", "sla" or "sagesla".
        text_rows: rows of text that keys and values are made of (the rest counts as equal to the last).
        graph: also time the step as a CUDA graph.

    Raises:
        RequestError: unknown size, precision or attention, a top-k that does not fit, or no GPU.
    """
    config = bench_config(size)
    if precision not in PRECISIONS:
        raise RequestError(f"precision must be one of {', '.join(PRECISIONS)}, got '{precision}'")
    how = {step: AttentionConfig(attention, step.top_k) for step in steps}
    if attention == "original" and len({step.top_k for step in steps}) > 1:
        raise RequestError("top-k changes nothing with attention 'original'; vary it with sla or sagesla")
    if not torch.cuda.is_available():
        raise RequestError("bench transformer needs a CUDA device; there is none here")
    net = random_transformer(config, PRECISIONS[precision])
    weights = round(torch.cuda.memory_allocated() / 2**30, 2)
    model = {"size": size, "precision": precision, "attention": attention}
    for step in steps:
        net.attention = how[step]
        case = f"{size} {step.name} {precision} {attention}"
        record = _time_step(net, case, step, text_rows, repeats, graph)
        bound = step_bound(config, step.tokens, attention, step.top_k, precision) * 1e3
        if "ms" in record:
            flops = step_flops(config, step.tokens, attention, step.top_k)[2]
            record["share_of_bound"] = round(bound / record["ms"]["p50"], 3)
            record["tflops"] = round(flops / record["ms"]["p50"] / 1e9, 1)
        record |= {"bound_ms": round(bound, 1), "weights_gib": weights}
        yield {"bench": "transformer", "case": case, **model, **record}


@torch.inference_mode()
def _time_step(net: WanTransformer, case: str, step: Step, text_rows: int, repeats: int, graph: bool) -> dict[str, Any]:
    own = torch.Generator("cuda").manual_seed(0)  # goes on where the default one may not, see `graph_facts`
    draw = partial(torch.randn, device="cuda", generator=own)
    noise = draw(1, 16, *step.latent)
    condition = draw(1, net.condition_channels, *step.latent) if net.condition_channels else None
    context = net.tell(draw(1, text_rows, net.config.text_dim), text_rows=512)
    time = torch.full((1,), 937.5, device="cuda")
    shape = {"num_frames": step.num_frames, "tokens": step.tokens, "text_rows": text_rows, "top_k": step.top_k}

    def run() -> Tensor:
        return net(noise, time, context, condition)  # type: ignore[no-any-return]

    record = time_case(Case(case, run, shape), repeats)
    if "ms" not in record:
        return record
    record.pop("gbytes_per_s")
    return record | host_facts(run) | (graph_facts(run, repeats) if graph else {})


def bench_config(size: str) -> TransformerConfig:
    """Sizes of "1.3B", "14B", "tiny" or "A14B-I2V".

    Raises:
        RequestError: unknown size.
    """
    name = size.removeprefix("A").removesuffix("-I2V")
    if name not in TRANSFORMERS:
        raise RequestError(f"bench sizes are {', '.join(TRANSFORMERS)} and A14B-I2V; got '{size}'")
    config = TRANSFORMERS[name]
    return replace(config, in_dim=36) if size.endswith("-I2V") else config


@torch.inference_mode()
def random_transformer(config: TransformerConfig, format: str) -> WanTransformer:
    """On the GPU: drawn in bfloat16, all of it, then rounded layer by layer to a format of `ops.rows`."""
    with torch.device("meta"):
        net = WanTransformer(config).to(torch.bfloat16)
    net.to_empty(device="cuda")
    torch.manual_seed(0)
    for parameter in net.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.02)
    for name, parameter in net.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)
    if format != "bf16":
        round_linears(net, format)
    join_qkv(net)
    return net.eval()


def step_flops(config: TransformerConfig, tokens: int, attention: str, top_k: float) -> tuple[float, float, float]:
    """Multiply-adds times two of the blocks' linear layers, of their attention, and of both."""
    dim, layers = config.dim, config.num_layers
    linears = 2.0 * tokens * layers * (6 * dim * dim + 2 * dim * config.ffn_dim)
    blocks = math.ceil(tokens / 64)
    keys = tokens if attention == "original" else 64 * kept_blocks(top_k, blocks)
    own = 4.0 * tokens * layers * dim * (keys + 512)
    if attention != "original":
        own += 2.0 * tokens * layers * dim * 2 * HEAD_SIZE
    return linears, own, linears + own


def step_bound(config: TransformerConfig, tokens: int, attention: str, top_k: float, precision: str) -> float:
    """Seconds that the products alone take at the rates of `bench.op.PEAKS`; nothing else counted."""
    linears, own, _ = step_flops(config, tokens, attention, top_k)
    rate = PEAKS["int8" if precision.startswith("int8") else precision]
    return linears / rate + own / PEAKS["bf16" if attention != "sagesla" else "int8"]
