"""Averages of weights over training, in float32: exponential ones, and powers of the time trained.

Source of the latter: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), as
TurboDiffusion and rCM use it, there with a relative width of 0.1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import nn

from .distributed import local


class Average(ABC):
    """Of a module's parameters over its updates; sharded as the module is."""

    def __init__(self, module: nn.Module) -> None:
        self.source = list(module.parameters())
        self.values = [p.detach().float().clone() for p in self.source]

    @abstractmethod
    def decay(self, step: int) -> float:
        """What update number `step` (0 for the first) leaves of the average before it, in 0..1."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update number `step`."""
        now = [local(p.detach()).float() for p in self.source]
        torch._foreach_lerp_([local(v) for v in self.values], now, 1 - self.decay(step))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the module's parameters with the averaged ones."""
        for value, parameter in zip(self.values, self.source, strict=True):
            kept = parameter.detach().float().clone()
            parameter.copy_(value)
            value.copy_(kept)


class ExponentialAverage(Average):
    """The older weights are, the less they count: by `limit` with every update, by more at first."""

    def __init__(self, module: nn.Module, limit: float) -> None:
        super().__init__(module)
        self.limit = limit

    def decay(self, step: int) -> float:
        return min(self.limit, (1 + step) / (10 + step))


def exponent(width: float) -> float:
    """The power `gamma` whose average has so wide a profile, as a share of the run (0 < width < 0.28).

    The largest real root of x^3 + 7 x^2 + (16 - 1/width^2) x + (12 - 1/width^2).
    """
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots.real[abs(roots.imag) < 1e-9].max())


class PowerAverage(Average):
    """Weights after update t count by t^gamma; the first replaces what was there.

    Args:
        module: whose parameters are followed.
        width: relative width, e.g. 0.1: the average looks back over about a tenth of the run.
    """

    def __init__(self, module: nn.Module, width: float) -> None:
        super().__init__(module)
        self.gamma = exponent(width)

    def decay(self, step: int) -> float:
        return (1 - 1 / (step + 1)) ** (self.gamma + 1)
