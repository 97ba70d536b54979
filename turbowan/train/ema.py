"""Power-function averages of weights: the older a run, the longer the memory.

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), as TurboDiffusion
and rCM use it, there with a relative width of 0.1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from .distributed import local
from .loop import Average


def exponent(width: float) -> float:
    """The power `gamma` whose average has so wide a profile, as a share of the run (0 < width < 0.28).

    The largest real root of x^3 + 7 x^2 + (16 - 1/width^2) x + (12 - 1/width^2).
    """
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots.real[abs(roots.imag) < 1e-9].max())


class PowerAverage(Average):
    """The average of a module's weights over its updates, weighted by t^gamma; float32, sharded as the module is.

    Args:
        module: whose parameters are followed.
        width: relative width, e.g. 0.1: the average looks back over about a tenth of the run.
    """

    def __init__(self, module: nn.Module, width: float) -> None:
        super().__init__(module, decay=0.0)
        self.gamma = exponent(width)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update number `step` (0 for the first, which replaces what was there)."""
        decay = (1 - 1 / (step + 1)) ** (self.gamma + 1)
        torch._foreach_lerp_([local(v) for v in self.values], [local(p.detach()) for p in self.source], 1 - decay)
