"""Activation checkpointing: a block's intermediate results are dropped in the forward pass and made again in the
backward one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..errors import CheckpointError
from ..models.transformer import Stream
from .distributed import blocks_of

KINDS = ("none", "mm_only", "block")
_aten = torch.ops.aten
# what "mm_only" keeps: matrix products and fused attention, the dear part of a block
_KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def checkpoint_activations(net: nn.Module, kind: str) -> None:
    """Let a transformer's blocks recompute in the backward pass: in place, and before the net is sharded.

    Args:
        kind: "none", "block" (each block keeps its input only) or "mm_only" (matrix products and fused attention are
            kept, all else is recomputed).

    Raises:
        CheckpointError: there is no such kind.
    """
    if kind not in KINDS:
        raise CheckpointError(f"activation_checkpointing must be one of {', '.join(KINDS)}, got '{kind}'")
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random in a block
    if kind == "mm_only":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _KEPT)
    for block in blocks_of(net):
        block.__dict__.pop("forward", None)  # of an earlier call
        if kind != "none":  # `forward`, not the block: FSDP's hooks stay outside and gather once for both passes
            block.forward = _checkpointed(block.forward, options)


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def run(stream: Stream, *rest: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(stream, *rest)
        return checkpoint(lambda *kept: forward(list(kept), *rest), *stream, **options)

    return run
