"""One evaluation of the transformer at true size, with random weights made on the GPU: a step of the denoise time."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import RequestError
from ..models.pack import join_qkv, round_linears
from ..models.transformer import HEAD_SIZE, AttentionConfig, TransformerConfig, WanTransformer
from ..ops.block_map import kept_blocks
from .case import Case
from .op import PEAKS, time_case
from .random_weights import TRANSFORMERS

LATENTS = {"480p": (21, 60, 104), "720p": (21, 90, 160)}  # frames, height, width of 81 frames
PRECISIONS = {"bf16": "bf16", "int8": "int8_row", "fp8": "fp8_row", "int8_block": "int8_block"}


def run_transformer(
    size: str,
    latent: tuple[int, int, int],
    precision: str = "int8",
    attention: str = "sla",
    top_k: float = 0.1,
    text_rows: int = 512,
    repeats: int = 10,
) -> dict[str, Any]:
    """Median of a step.

    Args:
        size: "1.3B", "14B", or "A14B-I2V", which is 14B with 36 channels.
        latent: frames, height, width.
        precision: of the linear layers, a key of PRECISIONS. attention: "original", "sla" or "sagesla".
        text_rows: rows of text that keys and values are made of (the rest counts as equal to the last).

    Raises:
        RequestError: unknown size or precision, or no GPU.
    """
    if not torch.cuda.is_available():
        raise RequestError("bench transformer needs a CUDA device; there is none here")
    if precision not in PRECISIONS:
        raise RequestError(f"precision must be one of {', '.join(PRECISIONS)}, got '{precision}'")
    with torch.inference_mode():
        net = random_transformer(size, PRECISIONS[precision])
        net.attention = AttentionConfig(attention, top_k)
        noise = torch.randn(1, 16, *latent, device="cuda")
        extra = net.condition_channels
        condition = torch.randn(1, extra, *latent, device="cuda") if extra else None
        context = net.tell(torch.randn(1, text_rows, net.config.text_dim, device="cuda"), text_rows=512)
        time = torch.full((1,), 937.5, device="cuda")
        tokens = latent[0] * latent[1] * latent[2] // 4
        case = Case(
            f"{size} {latent[2] * 8}x{latent[1] * 8} {precision} {attention}",
            lambda: net(noise, time, context, condition),
            {"tokens": tokens, "text_rows": text_rows, "top_k": top_k},
        )
        weights = torch.cuda.memory_allocated()
        record = time_case(case, repeats)
    bound = step_bound(net.config, tokens, attention, top_k, precision)
    if "ms" in record:
        record["share_of_bound"] = round(bound * 1e3 / record["ms"]["p50"], 3)
        record["tflops"] = round(step_flops(net.config, tokens, attention, top_k)[2] / record["ms"]["p50"] / 1e9, 1)
        record.pop("gbytes_per_s")
    return {
        "bench": "transformer", "case": case.name, **record,
        "bound_ms": round(bound * 1e3, 1), "weights_gib": round(weights / 2**30, 2),
    }  # fmt: skip


def random_transformer(size: str, format: str) -> WanTransformer:
    """On the GPU: drawn in bfloat16, all of it, then rounded layer by layer to a format of `ops.rows`.

    Raises:
        RequestError: unknown size.
    """
    name = size.removeprefix("A").removesuffix("-I2V")
    if name not in TRANSFORMERS:
        raise RequestError(f"bench sizes are {', '.join(TRANSFORMERS)} and A14B-I2V; got '{size}'")
    config = TRANSFORMERS[name]
    if size.endswith("-I2V"):
        config = TransformerConfig(**{**vars(config), "in_dim": 36})
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
