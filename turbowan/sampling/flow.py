"""Many-step samplers for undistilled flow-matching weights: Euler and UniPC, with a time shift.

Source of UniPC: Zhao et al., "UniPC: A Unified Predictor-Corrector Framework" (2023), the B(h) = exp(h) - 1 variant of
order 2, predicting x0; on flows alpha = 1 - t and sigma = t. The state is kept in float64.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import RequestError
from .rcm import StepCallback, VelocityFunction

SOLVERS = ("euler", "unipc")
_FIRST_TIME = 0.999  # the largest unshifted time of Wan's training schedule of 1,000 steps


def timesteps(num_steps: int, shift: float) -> Tensor:
    """Times evenly spaced in 0..1, moved towards noise by `shift`: float64 [num_steps + 1], falling to 0.

    Args:
        num_steps: at least 1.
        shift: s > 0 in t -> s t / (1 + (s - 1) t); 1 changes nothing.

    Raises:
        RequestError: num_steps or shift out of range.
    """
    if num_steps < 1:
        raise RequestError(f"the number of steps must be at least 1, got {num_steps}")
    if not 0 < shift < math.inf:
        raise RequestError(f"shift must be positive, got {shift}")
    t = torch.linspace(_FIRST_TIME, 0, num_steps + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)


def sample(
    velocity_fn: VelocityFunction,
    noise: Tensor,
    timesteps: Tensor,
    solver: str = "unipc",
    on_step: StepCallback | None = None,
) -> Tensor:
    """Integrate the flow from noise to data.

    Args:
        velocity_fn: (latent float64, t in 0..1, step) -> velocity, guidance included.
        noise: standard normal, the latent's shape.
        timesteps: float64 [N + 1], falling to 0.
        solver: "euler" or "unipc"; both evaluate the velocity once per step.
        on_step: called after each step with (step, latent, the time reached).

    Returns:
        float32, the shape of noise.

    Raises:
        RequestError: unknown solver.
    """
    if solver not in SOLVERS:
        raise RequestError(f"sampler must be one of rcm, {', '.join(SOLVERS)}, got '{solver}'")
    times = timesteps.double().tolist()
    unipc = _UniPC(times) if solver == "unipc" else None
    x = noise.double()
    for i, (t, t_next) in enumerate(pairwise(times)):
        velocity = velocity_fn(x, t, i).double()
        x = x + (t_next - t) * velocity if unipc is None else unipc.step(x, x - t * velocity, i)
        if on_step is not None:
            on_step(i, x, t_next)
    return x.float()


def _log_snr(t: float) -> float:
    """log(alpha / sigma): infinite at both ends, where every formula below has its limit."""
    if 0 < t < 1:
        return math.log((1 - t) / t)
    return math.inf if t <= 0 else -math.inf


class _UniPC:
    """Second-order predictor and corrector over x0 predictions; the first and last steps are of first order."""

    def __init__(self, times: list[float]) -> None:
        self.times = times
        self.log_snr = [_log_snr(t) for t in times]
        self.predictions: list[Tensor] = []  # x0 predictions of the last two steps, newest last
        self.start = torch.empty(0)  # the corrected state the last step started from
        self.order = 1  # of the last step

    def step(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        """State at times[i] and the x0 predicted from it -> state at times[i + 1]."""
        if i > 0:
            x = self._update(i - 1, self.start, self.order, corrected_by=x0)
        self.predictions = [*self.predictions[-1:], x0]
        self.start = x
        self.order = min(2, i + 1, len(self.times) - 1 - i)
        return self._update(i, x, self.order)

    def _update(self, i: int, x: Tensor, order: int, corrected_by: Tensor | None = None) -> Tensor:
        """From times[i] to times[i + 1], with the predictions up to times[i] and, correcting, that at times[i + 1]."""
        t, t_next = self.times[i], self.times[i + 1]
        h = self.log_snr[i + 1] - self.log_snr[i]
        decay = math.expm1(-h)
        newest = self.predictions[-1]
        out = t_next / t * x - (1 - t_next) * decay * newest
        slope = (1 - t_next) * decay
        if order == 2:
            ratio = (self.log_snr[i - 1] - self.log_snr[i]) / h
            past = (self.predictions[-2] - newest) / ratio
            if corrected_by is None:
                return out - slope * 0.5 * past
            first = (decay / -h - 1) / decay
            second = 2 * ((decay / -h - 1) / -h - 0.5) / decay
            weight = (second - first) / (ratio - 1)
            return out - slope * (weight * past + (first - weight) * (corrected_by - newest))
        return out if corrected_by is None else out - slope * 0.5 * (corrected_by - newest)
