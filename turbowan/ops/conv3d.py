"""3-D convolution, height and width padded with zeros on both sides, time not at all."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Constraints, Implementation, Operation


def _layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The result's: channels last where an input is, as cuDNN and oneDNN choose it; other kernels' results follow. And
    channels last where oneDNN may have made it, see below."""
    last = torch.channels_last_3d
    chosen = any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, weight))
    onednn = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return last if chosen or onednn else torch.contiguous_format


def _eager(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
    out = F.conv3d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride, padding)
    return out.contiguous(memory_format=_layout(x, weight))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    shape = (x.shape[0], weight.shape[0], *((n + 2 * p - k) // s + 1 for n, k, s, p in sizes))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x, weight))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
    """PyTorch itself calls oneDNN for large inputs only: 16 channels of 6x162x258 take 240 ms without, 19 with it, and
    16 with channels last."""
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    out = torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, [1, 1, 1], 1)
    return out.contiguous(memory_format=_layout(x, weight))


def _flops(x: tuple, weight: tuple, *rest: object, out_shape: tuple, **kwargs: object) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


_operation = Operation("conv3d", _eager, _fake, _flops)
if torch.backends.mkldnn.is_available():
    _where = Constraints(devices=("cpu",), dtypes=(torch.float32,))
    _operation.add(Implementation("onednn", _onednn, _where, priority=1))


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """[B, C, T, H, W] with weight [N, C, kT, kH, kW] and bias [N] -> [B, N, T', H', W'] in x's dtype."""
    return _operation(x, weight, bias, list(stride), list(padding))
