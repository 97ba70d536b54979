"""What stands between the projections and the attentions: RMSNorm and rotation of q and k with block means, and the
RMSNorm of cross-attention's q; and a copy, beside which they are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..models.transformer import HEAD_SIZE
from .case import Case, relative_error
from .op_linear import CHECKED_ROWS, SHAPES

BLOCKS = ((128, 64), (64, 64), (0, 0))  # of q and k; 0 = no means


def cases(shape: str, device: str = "cuda") -> Iterator[Case]:
    """`qk_norm_rope` of parts of one product, with and without block means, and `rms_norm`.

    Args:
        shape: a key of `op_linear.SHAPES`: rows, D, F.
    """
    q, k, *rest = _draw(shape, device)
    x = q.contiguous()
    yield Case(f"copy {q.shape[2]}", x.clone, {"rows": q.shape[1], "width": q.shape[2]}, 0, 4 * x.numel())
    yield _norm_case(x, rest[0], ops.rms_norm)
    for blocks in BLOCKS:
        yield _rope_case((q, k, *rest), blocks, ops.qk_norm_rope)


def candidates(shape: str, device: str = "cuda") -> Iterator[tuple[Case, Any]]:
    """What a sweep tries, with each kernel's configuration; shape as in `cases`."""
    from ..ops.triton import qk_norm_rope, rms_norm

    q, k, *rest = _draw(shape, device)
    for config in qk_norm_rope.candidates():
        run = partial(_with_heads, partial(qk_norm_rope.qk_norm_rope, config=config))
        yield _rope_case((q, k, *rest), BLOCKS[0], run), config
    x = q.contiguous()
    for norm_config in rms_norm.candidates():
        norm = partial(rms_norm.rms_norm, config=norm_config)
        yield _norm_case(x, rest[0], norm), norm_config


def _with_heads(function: Callable[..., tuple[Tensor, ...]], q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return function(q.unflatten(-1, (-1, HEAD_SIZE)), k.unflatten(-1, (-1, HEAD_SIZE)), *args)


def _draw(shape: str, device: str) -> tuple[Tensor, ...]:
    """q and k [1, L, D] as parts of [1, L, 3 D], their weights, cosines and sines."""
    length, width, _ = SHAPES[shape]
    q, k, _ = torch.randn(1, length, 3 * width, device=device, dtype=torch.bfloat16).chunk(3, dim=-1)
    weight_q, weight_k = (torch.rand(2, width, device=device) + 0.5).bfloat16().unbind(0)
    angles = torch.rand(length, HEAD_SIZE // 2, device=device) * 6.28
    return q, k, weight_q, weight_k, angles.cos(), angles.sin()


def _norm_case(x: Tensor, weight: Tensor, function: Callable[..., Tensor]) -> Case:
    _, length, width = x.shape
    run = partial(function, x, weight, 1e-6)

    def error() -> float:
        with ops.force(rms_norm="eager"):
            exact = ops.rms_norm(x[:, :CHECKED_ROWS].float(), weight, 1e-6)
        return relative_error(run()[:, :CHECKED_ROWS], exact)

    return Case(f"rms_norm {width}", run, {"rows": length, "width": width}, 0, 4 * length * width, error=error)


def _rope_case(
    inputs: tuple[Tensor, ...], blocks: tuple[int, int], function: Callable[..., tuple[Tensor, ...]]
) -> Case:
    q, k, *weights, cos, sin = inputs
    _, length, width = q.shape
    run = partial(function, *inputs, 1e-6, *blocks)

    def error() -> float:
        tops = [x[:, :CHECKED_ROWS].float() for x in (q, k)]
        table = [x[:CHECKED_ROWS] for x in (cos, sin)]
        with ops.force(qk_norm_rope="eager"):
            exact = ops.qk_norm_rope(tops[0], tops[1], weights[0], weights[1], table[0], table[1])
        ours = (x[:, :CHECKED_ROWS] for x in run()[:2])
        return max(map(relative_error, ours, exact[:2]))

    means = sum(-(-length // block) for block in blocks if block)
    moved = 8 * length * width + 4 * (2 * cos.numel() + means * width)
    name = f"qk_norm_rope {width}" + (f" means of {blocks[0]} and {blocks[1]}" if means else "")
    return Case(name, run, {"rows": length, "width": width}, 0, moved, error=error)
