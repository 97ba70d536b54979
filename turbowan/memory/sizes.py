"""What parts weigh once loaded, from their shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checkpoints.assign import TRANSFORMER_FLOAT32
from ..models.pack import file_format, is_rounded, weight_shape
from ..models.transformer import WanTransformer
from ..ops.int8_blockwise import BLOCK


@dataclass(frozen=True)
class PartSize:
    """Bytes of a part's weights.

    rest: what is in no block. blocks: of each, in the order they run; empty for parts that are used as a whole.
    rounding: what turning one block's layers into another format takes for a moment. converted: what weights in another
    dtype or format than the file's take of the host's memory, at most, where a part is read there.
    """

    rest: int
    blocks: tuple[int, ...] = ()
    rounding: int = 0
    converted: int = 0

    @property
    def total(self) -> int:
        return self.rest + sum(self.blocks)

    @property
    def largest_block(self) -> int:
        return max(self.blocks, default=0)


def blocks_of(part: nn.Module) -> Sequence[nn.Module]:
    """The blocks that can come and go one by one, in the order they run; none where a part is used as a whole."""
    return list(getattr(part, "blocks", ()))


def part_size(part: nn.Module, dtype: torch.dtype, format: str | None = None) -> PartSize:
    """Of a part, which may be on the meta device, once its floating-point weights are in a dtype.

    Args:
        format: what a transformer's linear layers will be in (see `pack.prepare`); None: as they are.
    """
    blocks = blocks_of(part)
    if isinstance(part, WanTransformer):
        target = None if format in (None, file_format(part)) else format
        sizes = tuple(_transformer_bytes(block, dtype, target) for block in blocks)
        inside = {id(module) for block in blocks for module in block.modules()}
        rest = sum(
            _stored(f"{name}.{own}", weight, dtype, TRANSFORMER_FLOAT32)
            for name, module in part.named_modules() if id(module) not in inside
            for own, weight in _own(module)
        )  # fmt: skip
        largest = max((_elements(m) for m in part.blocks.modules() if is_rounded(m)), default=0)
        rounding = 4 * 4 * largest if target else 0  # float32, thrice while codes are made
        converted = _converted(part, dtype, TRANSFORMER_FLOAT32)  # all of it, before blocks are rounded one by one
        if file_format(part) != "bf16":
            converted += rest  # what is in 8 bits outside of blocks is expanded
        return PartSize(rest, sizes, rounding, max(converted, sum(sizes) + rest if target else 0))
    own_blocks = tuple(_bytes(block, dtype) for block in blocks)
    return PartSize(_bytes(part, dtype) - sum(own_blocks), own_blocks, converted=_converted(part, dtype))


def _transformer_bytes(block: nn.Module, dtype: torch.dtype, format: str | None) -> int:
    total = 0
    for name, module in block.named_modules():
        if format is not None and is_rounded(module, name):
            total += _linear_bytes(weight_shape(module), dtype, format)
        else:
            total += sum(_stored(f"{name}.{own}", w, dtype, TRANSFORMER_FLOAT32) for own, w in _own(module))
    return total


def _linear_bytes(shape: Sequence[int], dtype: torch.dtype, format: str) -> int:
    """Weight, scales and bias of a linear layer in a format."""
    rows, columns = shape
    if format == "bf16":
        return (columns + 1) * rows * dtype.itemsize
    scales = -(-rows // BLOCK) * -(-columns // BLOCK) if format == "int8_block" else rows
    return rows * columns + 4 * scales + rows * dtype.itemsize


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    held = (*module._parameters.items(), *module._buffers.items())
    return [(name, weight) for name, weight in held if weight is not None]


def _elements(module: nn.Module) -> int:
    rows, columns = weight_shape(module)
    return rows * columns


def _bytes(part: nn.Module, dtype: torch.dtype) -> int:
    weights = {id(w): w for w in (*part.parameters(), *part.buffers())}  # two names may share one
    return sum(_stored("", weight, dtype) for weight in weights.values())


def _converted(part: nn.Module, dtype: torch.dtype, float32_parts: Sequence[str] = ()) -> int:
    """Of the weights that are in another dtype than their file's."""
    weights = {id(w): (name, w) for name, w in (*part.named_parameters(), *part.named_buffers())}.values()
    rules = dtype, float32_parts
    return sum(_stored(name, w, *rules) for name, w in weights if _target(name, w, *rules) != w.dtype)


def _stored(name: str, weight: Tensor, dtype: torch.dtype, float32_parts: Sequence[str] = ()) -> int:
    return weight.numel() * _target(name, weight, dtype, float32_parts).itemsize


def _target(name: str, weight: Tensor, dtype: torch.dtype, float32_parts: Sequence[str]) -> torch.dtype:
    """As `checkpoints.assign` would have it: 8 bits stay, and float32 where the file has it and the layer wants it."""
    if weight.element_size() == 1 or not weight.is_floating_point():
        return weight.dtype
    wide = name.endswith(("scale", "scale_weight")) or (
        weight.dtype == torch.float32 and any(piece in name for piece in float32_parts)
    )
    return torch.float32 if wide else dtype
