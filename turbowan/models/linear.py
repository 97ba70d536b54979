"""Linear layers whose weights stay in 8 bits, drop-in for `nn.Linear`. Buffers carry the names the files use."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.int8_blockwise import BLOCK


class Int8BlockLinear(nn.Module):
    """W8A8 with a scale per 128 x 128 block: TurboDiffusion's `-quant` format."""

    int8_weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        blocks = (-(-out_features // BLOCK), -(-in_features // BLOCK))
        self.register_buffer("int8_weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(blocks, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.empty(out_features, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, K] -> [B, L, N]; activation blocks never cross samples."""
        batch, rows = x.shape[0], x.shape[1]
        padding = -rows % BLOCK if batch > 1 else 0
        flat = F.pad(x, (0, 0, 0, padding)).flatten(0, 1)
        out = ops.linear_int8_blockwise(flat, self.int8_weight, self.scale, self.bias)
        return out.unflatten(0, (batch, rows + padding))[:, :rows]


class Int8RowLinear(nn.Module):
    """W8A8 with a scale per output row and per token: lightx2v's int8 format."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, 1, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.empty(out_features, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        out = ops.linear_int8_rowwise(x.flatten(0, -2), self.weight, self.weight_scale, self.bias)
        return out.unflatten(0, x.shape[:-1])


class Fp8Linear(nn.Module):
    """Weights in float8 with one scale, expanded for each product: ComfyUI's `fp8_scaled` format."""

    weight: Tensor
    scale_weight: Tensor
    bias: Tensor | None

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
        return ops.linear_fp8_scaled(x, self.weight, self.scale_weight, self.bias)
