"""Rotary position embedding on adjacent pairs, with Wan's split of a head into time, height and width."""

import torch
from torch import Tensor

from .registry import Operation


def rope_table(
    frames: int, height: int, width: int, head_size: int, device: torch.device | str = "cpu", theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's angles, in float32.

    Args:
        frames, height, width: the token grid.
        head_size: D; of its D / 2 pairs, height and width take D // 6 each and time the rest.

    Returns:
        Two tensors [frames * height * width, head_size / 2]; pairs ordered time, height, width, tokens t-major.
    """
    pairs = head_size // 6
    angles = []
    for size, dim in ((frames, head_size - 4 * pairs), (height, 2 * pairs), (width, 2 * pairs)):
        frequency = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        angles.append(torch.outer(torch.arange(size, dtype=torch.float32), frequency))
    time, row, column = angles
    grid = torch.cat(
        [
            time[:, None, None].expand(-1, height, width, -1),
            row[None, :, None].expand(frames, -1, width, -1),
            column[None, None].expand(frames, height, -1, -1),
        ],
        dim=-1,
    ).reshape(frames * height * width, head_size // 2)
    return grid.cos().to(device), grid.sin().to(device)


def _eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def _fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_operation = Operation("rope", _eager, _fake)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (2i, 2i+1) of every head by the token's angle, in float32.

    Args:
        x: [B, L, H, D]. cos, sin: float32 [L, D / 2] from `rope_table`.

    Returns:
        [B, L, H, D] in x's dtype.
    """
    return _operation(x, cos, sin)
