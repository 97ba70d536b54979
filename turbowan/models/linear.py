"""Linear layers whose weights stay in 8 bits, drop-in for `nn.Linear`. Buffers carry the names the files use.

Those that multiply 8-bit numbers name the `format` of the rows they read, so that whatever makes the rows (a norm, an
activation) rounds them on the way, once for all layers that read them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from ..ops.int8_blockwise import BLOCK
from ..ops.rows import quantize_rows, sample_rows

Addition = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rows:
    """What a linear layer reads: [B, L, K] as the rows [M, K] of a format (see `ops.rows`) with their scales."""

    values: Tensor
    scale: Tensor
    format: str
    batch: int
    length: int

    def samples(self, out: Tensor) -> Tensor:
        """[M, N] made of these rows -> [B, L, N]."""
        return out.unflatten(0, (self.batch, -1))[:, : self.length]


def read_rows(x: Tensor, format: str) -> Rows:
    """[B, L, K] rounded to a format."""
    return Rows(*quantize_rows(sample_rows(x, format), format), format, x.shape[0], x.shape[1])


def norm_rows(
    x: Tensor,
    format: str,
    eps: float,
    variance: str,
    delta: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Rows]:
    """`ops.residual_norm`: the sum x + delta * gate, and its norm as rows in a format."""
    x, values, rounding = ops.residual_norm(x, delta, gate, weight, bias, shift, scale, eps, variance, format)
    return x, Rows(values, rounding, format, x.shape[0], x.shape[1])


def hidden_rows(layer: nn.Module, rows: Rows, dtype: torch.dtype, format: str) -> Rows:
    """GELU (tanh) of what a layer makes of rows, rounded to dtype and then to a format."""
    if format == "bf16" and _is_plain(layer, rows):
        values = ops.linear(rows.values, layer.weight, layer.bias, "gelu_tanh")
        return Rows(values, rows.scale, format, rows.batch, rows.length)
    if format == "bf16" and rows.format != "bf16":  # an adapter wants the numbers: no pass of its own for GELU
        values = rows.samples(layer.product(rows, dtype, "gelu_tanh")).flatten(0, 1)  # type: ignore[operator]
        return Rows(values, values.new_empty(0), format, rows.batch, rows.length)
    x = project(layer, rows, dtype)
    return Rows(*ops.gelu_rows(x, format), format, x.shape[0], x.shape[1])


def format_of(*layers: nn.Module) -> str:
    """What all these layers read; "bf16", numbers as they are, where they differ: each then rounds on its own."""
    formats = {getattr(layer, "reads", "bf16") for layer in layers}
    return formats.pop() if len(formats) == 1 else "bf16"


def project(layer: nn.Module, rows: Rows, dtype: torch.dtype) -> Tensor:
    """[B, L, N] in `dtype`, of a layer and rows in its format, or in "bf16"."""
    if _is_plain(layer, rows):
        return ops.linear(rows.samples(rows.values), layer.weight, layer.bias)
    if rows.format == "bf16":
        return layer(rows.samples(rows.values))  # type: ignore[no-any-return]
    return rows.samples(layer.product(rows, dtype))  # type: ignore[operator]


def _is_plain(layer: nn.Module, rows: Rows) -> TypeGuard[nn.Linear]:
    """Whether calling the layer is nothing but a product of numbers of one dtype, which no autocast is to make one."""
    if type(layer) is not nn.Linear or torch.is_autocast_enabled(rows.values.device.type):
        return False
    return not is_changed(layer) and layer.weight.dtype == rows.values.dtype


def is_changed(layer: nn.Module) -> bool:
    """Whether somebody hooked into the layer (or into all modules), replaced its `forward` or compiled it: it must be
    called then, as a module."""
    return bool(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
        or "forward" in vars(layer) or layer._compiled_call_impl is not None or _has_any_global_hook()
    )  # fmt: skip


def _added(out: Tensor, x: Tensor, addition: Addition | None) -> Tensor:
    return out if addition is None else out + addition(x).to(out.dtype)


class EightBitLinear(nn.Module, ABC):
    """W8A8: reads rows of its `format`, or rounds what it gets to it.

    Subclasses name the format, the buffers and the product. addition: [..., K] -> [..., N], what an adapter adds to the
    result; a layer that has one, or hooks, wants the numbers themselves, for these.
    """

    format: str
    bias: Tensor
    addition: Addition | None = None

    @property
    def reads(self) -> str:
        """What whatever comes before this layer should hand it."""
        return self.format if self.addition is None and not is_changed(self) else "bf16"

    @abstractmethod
    def product(self, rows: Rows, dtype: torch.dtype, activation: str = "none") -> Tensor:
        """[M, N] in `dtype` from rows in this layer's format; activation: as of `ops.product_int8_rowwise`."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, K] -> [B, L, N] in x's dtype."""
        return _added(project(self, read_rows(x, self.format), x.dtype), x, self.addition)


class Int8BlockLinear(EightBitLinear):
    """A scale per 128 x 128 block: TurboDiffusion's `-quant` format. Activation blocks never cross samples."""

    format = "int8_block"
    int8_weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        blocks = (-(-out_features // BLOCK), -(-in_features // BLOCK))
        self.register_buffer("int8_weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(blocks, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.empty(out_features, device=device))

    def product(self, rows: Rows, dtype: torch.dtype, activation: str = "none") -> Tensor:
        weight = self.int8_weight, self.scale, self.bias
        return ops.product_int8_blockwise(rows.values, rows.scale, *weight, dtype, activation)


class RowLinear(EightBitLinear):
    """A scale per output row and per token."""

    weight: Tensor
    weight_scale: Tensor
    codes = torch.int8

    def __init__(self, in_features: int, out_features: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=self.codes, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, 1, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.empty(out_features, device=device))

    def product(self, rows: Rows, dtype: torch.dtype, activation: str = "none") -> Tensor:
        product = ops.product_int8_rowwise if self.format == "int8_row" else ops.product_fp8_rowwise
        weight = self.weight, self.weight_scale.flatten(), self.bias
        return product(rows.values, rows.scale, *weight, dtype, activation)


class Int8RowLinear(RowLinear):
    """int8 codes: lightx2v's int8 format."""

    format = "int8_row"


class Fp8RowLinear(RowLinear):
    """float8 (e4m3) codes."""

    format = "fp8_row"
    codes = torch.float8_e4m3fn


class Fp8Linear(nn.Module):
    """Weights in float8 with one scale, expanded for each product: ComfyUI's `fp8_scaled` format."""

    weight: Tensor
    scale_weight: Tensor
    bias: Tensor | None
    addition: Addition | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype = torch.float8_e4m3fn,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.register_buffer("scale_weight", torch.ones(1, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.empty(out_features, device=device) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return _added(ops.linear_fp8_scaled(x, self.weight, self.scale_weight, self.bias), x, self.addition)
