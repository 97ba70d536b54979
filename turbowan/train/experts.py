"""Two experts trained as one network: the noise level says which of them predicts."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from ..models.transformer import AttentionConfig, WanTransformer
from ..sampling.experts import expert_for

NAMES = ("high", "low")


class Experts(nn.Module):
    """A high-noise and a low-noise transformer, equal at the start.

    Every call's rows must lie on one side of the boundary; the first one's time is read, which waits for the device.

    Args:
        net: whose weights both start from. boundary: from this time on, 0..1, the high-noise expert predicts.
    """

    def __init__(self, net: WanTransformer, boundary: float) -> None:
        super().__init__()
        self.high, self.low, self.boundary = net, copy.deepcopy(net), boundary

    @property
    def blocks(self) -> nn.ModuleList:
        """Those of both, for what treats a network block by block."""
        return nn.ModuleList([*self.high.blocks, *self.low.blocks])

    @property
    def attention(self) -> AttentionConfig:
        return self.high.attention

    @attention.setter
    def attention(self, how: AttentionConfig) -> None:
        self.high.attention = self.low.attention = how

    def forward(self, latent: Tensor, timestep: Tensor, *args: Tensor | None, **kwargs: int) -> Tensor:
        name = expert_for(float(timestep[0]) / 1000, self.boundary)
        return getattr(self, name)(latent, timestep, *args, **kwargs)
