"""Attention on the named shapes: sparse-linear as a whole and in parts, dense, and to a prompt's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.attention import in_plain_pytorch
from ..ops.block_map import kept_blocks
from .case import Case, relative_error
from .op_linear import SHAPES

TOP_K = 0.1
HEAD_SIZE = 128
PROMPTS = ((512, 1), (64, 449))  # keys, and how many the last of them stands for


class Inputs:
    """Random q and k as `qk_norm_rope` leaves them, v as a part of a wider product, and what is derived from them."""

    def __init__(self, shape: str, device: str, blocks: tuple[int, int] = (128, 64)) -> None:
        from ..ops.triton.linear_state import linear_state
        from ..ops.triton.select_blocks import block_means, select_blocks, token_means

        self.length, width, _ = SHAPES[shape]
        self.heads = width // HEAD_SIZE
        self.blocks = blocks
        fused = torch.randn(1, self.length, 3, self.heads, HEAD_SIZE, device=device, dtype=torch.bfloat16)
        self.q, self.k, self.v = fused[:, :, 0].contiguous(), fused[:, :, 1].contiguous(), fused[:, :, 2]
        self.weight = torch.randn(HEAD_SIZE, HEAD_SIZE, device=device, dtype=torch.bfloat16) / HEAD_SIZE**0.5
        self.bias = torch.randn(HEAD_SIZE, device=device, dtype=torch.bfloat16)
        self.means = block_means(self.q, blocks[0]), block_means(self.k, blocks[1])
        self.k_mean = token_means(self.means[1], self.length, blocks[1])
        self.lists = select_blocks(*self.means, self.k_mean, TOP_K)
        self.state = linear_state(self.k, self.v, self.weight)
        self.bytes = self.q.numel() * self.q.element_size()  # of q, k, v or the result
        keys = kept_blocks(TOP_K, -(-self.length // blocks[1])) * blocks[1]
        self.sparse_flops = 4 * self.length * keys * HEAD_SIZE * self.heads
        self.branch_flops = 2 * self.length * HEAD_SIZE**2 * self.heads  # phi(q) times the state; as many to make it
        names = ("tokens", "heads", "head_size", "block_q", "block_k", "top_k")
        self.shape: dict[str, int | float] = dict(
            zip(names, (self.length, self.heads, HEAD_SIZE, *blocks, TOP_K), strict=True)
        )

    def whole(self, precision: str, given: bool = True, by: str | None = None) -> Tensor:
        """given: the means of blocks come with q and k. by: an implementation, by default the registry's choice."""
        rest = (self.weight, self.bias, TOP_K, *self.blocks, precision, self.means if given else None)
        with ops.force(sparse_linear_attention=by) if by else nullcontext():
            return ops.sparse_linear_attention(self.q, self.k, self.v, *rest)

    def error(self, precision: str, by: str | None = None) -> float:
        """Of the whole operation against the eager twin with the same means; in float32, but for SageSLA's rounding."""
        q, k, v = (x if precision == "int8" else x.float() for x in (self.q, self.k, self.v))
        rest = (self.weight, self.bias, TOP_K, *self.blocks, precision, self.means)
        with ops.force(sparse_linear_attention="eager"):
            expected = ops.sparse_linear_attention(q, k, v, *rest)
        return relative_error(self.whole(precision, by=by), expected)


def cases(shape: str, device: str = "cuda") -> Iterator[Case]:
    """The whole operation, its parts, dense attention, and cross-attention.

    Args:
        shape: a key of `op_linear.SHAPES`: rows, D, F.
    """
    from ..ops.triton import sage_quantize, select_blocks

    at = Inputs(shape, device)
    flops = at.sparse_flops + 2 * at.branch_flops
    for precision in ("bf16", "int8"):
        run, error = partial(at.whole, precision), partial(at.error, precision)
        yield Case(f"sparse-linear {precision}", run, at.shape, flops, 4 * at.bytes, precision, error)
    yield Case("sparse-linear bf16, without means", partial(at.whole, "bf16", False), at.shape, flops, 4 * at.bytes)
    if find_spec("cudnn"):  # the extra
        run, error = partial(at.whole, "bf16", by="cudnn"), partial(at.error, "bf16", by="cudnn")
        yield Case("sparse-linear bf16 by cuDNN", run, at.shape, flops, 4 * at.bytes, error=error)

    select = partial(_select, at)
    yield Case("part: selection", select, at.shape, 0, sum(4 * x.numel() for x in (*at.means, at.lists)))
    yield _state(at)
    yield _sparse(at)
    means = partial(select_blocks.block_means, at.k, at.blocks[1])
    yield Case("part: means of k", means, at.shape, 0, at.bytes)
    keys = partial(sage_quantize.quantize_blocks, at.k, at.k_mean, at.blocks[1])
    yield Case("part: int8 keys", keys, at.shape, 0, at.bytes * 3 // 2)
    yield Case("part: e4m3 values", partial(sage_quantize.quantize_values, at.v), at.shape, 0, at.bytes * 5 // 2)
    yield _sage(at)

    dense = 4 * at.length**2 * HEAD_SIZE * at.heads
    yield Case("dense", partial(ops.attention, at.q, at.k, at.v), at.shape, dense, 4 * at.bytes)
    for prompt in PROMPTS:
        yield _short(at.q, *prompt, ops.attention)
        yield _short(at.q, *prompt, in_plain_pytorch, ", PyTorch's")


def candidates(shape: str, device: str = "cuda") -> Iterator[tuple[Case, Any]]:
    """What a sweep tries, with each kernel's configuration; shape as in `cases`.

    Errors are distances from the table's choice; for short attention, from the eager twin.
    """
    from ..ops.triton import linear_state, sage_attention, short_attention, sparse_attention

    for blocks in ((128, 64), (64, 128)):
        at = Inputs(shape, device, blocks)
        for state_config in linear_state.candidates() if blocks == (128, 64) else ():
            yield _state(at, state_config), state_config
        for config in sparse_attention.candidates(*blocks):
            yield _sparse(at, config), config
        for sage_config in sage_attention.candidates(*blocks):
            yield _sage(at, sage_config), sage_config
    for short_config in short_attention.candidates():
        for prompt in PROMPTS:
            yield _short(at.q, *prompt, partial(short_attention.attention, config=short_config)), short_config


def _select(at: Inputs) -> Tensor:
    from ..ops.triton.select_blocks import select_blocks, token_means

    return select_blocks(*at.means, token_means(at.means[1], at.length, at.blocks[1]), TOP_K)


def _state(at: Inputs, config: Any = None) -> Case:
    """What all keys leave for the linear branch."""
    from ..ops.triton.linear_state import linear_state

    run = partial(linear_state, at.k, at.v, at.weight, config)
    error = None if config is None else lambda: max(map(relative_error, run(), at.state))
    return Case("part: state", run, at.shape, at.branch_flops, 2 * at.bytes, error=error)


def _sparse(at: Inputs, config: Any = None) -> Case:
    """What follows selection and state."""
    from ..ops.triton.sparse_attention import sparse_attention

    arguments = (at.q, at.k, at.v, at.lists, *at.state, at.bias, *at.blocks)
    return _kernel("part: sparse kernel", sparse_attention, arguments, at, config, 4 * at.bytes, "bf16")


def _sage(at: Inputs, config: Any = None) -> Case:
    """The same in 8 bits, which follow rounding too."""
    from ..ops.triton import sage_attention, sage_quantize

    keys = sage_quantize.quantize_blocks(at.k, at.k_mean, at.blocks[1])
    values = sage_quantize.quantize_values(at.v)
    arguments = (at.q, keys, values, at.lists, *at.state, at.bias, *at.blocks)
    return _kernel("part: int8 kernel", sage_attention.sage_attention, arguments, at, config, 3 * at.bytes, "int8")


def _kernel(
    name: str, function: Callable[..., Tensor], arguments: tuple, at: Inputs, config: Any, moved: int, peak: str
) -> Case:
    run = partial(function, *arguments, config)
    error = None if config is None else lambda: relative_error(run(), function(*arguments))
    return Case(name, run, at.shape, at.sparse_flops + at.branch_flops, moved, peak, error)


def _short(q: Tensor, keys: int, count: int, function: Callable[..., Tensor], whose: str = "") -> Case:
    k, v = torch.randn(2, 1, keys, *q.shape[2:], device=q.device, dtype=q.dtype).unbind(0)
    shape: dict[str, int | float] = {"tokens": q.shape[1], "heads": q.shape[2], "keys": keys, "last_key_count": count}

    def error() -> float:
        return relative_error(function(q, k, v, count), in_plain_pytorch(q.float(), k.float(), v.float(), count))

    run = partial(function, q, k, v, count)
    moved = 2 * q.numel() * q.element_size()
    return Case(f"to {keys} keys{whose}", run, shape, 4 * q.numel() * keys, moved, error=error)
