"""The rCM sampler: 1 to 4 steps, stochastic (SDE) or deterministic (ODE).

Source: NVlabs/rcm and thu-ml/TurboDiffusion (Apache-2.0). The state is kept in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import RequestError

VelocityFunction = Callable[[Tensor, float, int], Tensor]
StepCallback = Callable[[int, Tensor, float], None]

MAX_STEPS = 4
_MIDDLE_ANGLES = (1.5, 1.4, 1.0)  # TrigFlow times after the first


def timesteps(num_steps: int, sigma_max: float) -> Tensor:
    """The time grid: float64 [num_steps + 1] in 0..1, falling, ending in 0.

    Args:
        num_steps: 1 to 4.
        sigma_max: first noise level, > 0; the grid starts at sigma_max / (1 + sigma_max).

    Raises:
        RequestError: num_steps or sigma_max out of range, or a sigma_max below the second time of the grid.
    """
    if not 1 <= num_steps <= MAX_STEPS:
        raise RequestError(f"the rcm sampler takes 1 to {MAX_STEPS} steps, got {num_steps}")
    if not sigma_max > 0:
        raise RequestError(f"sigma_max must be positive, got {sigma_max}")
    angles = torch.tensor([*_MIDDLE_ANGLES[: num_steps - 1], 0.0], dtype=torch.float64)
    angles = torch.cat([torch.tensor([sigma_max], dtype=torch.float64).atan(), angles])
    if num_steps > 1 and angles[0] <= angles[1]:
        lowest = torch.tensor(_MIDDLE_ANGLES[0], dtype=torch.float64).tan().item()
        raise RequestError(f"sigma_max must exceed {lowest:.1f} for {num_steps} steps, got {sigma_max}")
    return angles.sin() / (angles.cos() + angles.sin())


def round_inputs(
    latent: Tensor, timestep: Tensor, condition: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latent, timestep (0..1000, a float32 product) and image condition as the network gets them: float32 with the
    values of bf16, as in the official code, whatever the network computes in."""
    known = None if condition is None else _bf16_values(condition)
    return _bf16_values(latent.float()), _bf16_values(timestep), known


def _bf16_values(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def sample(
    velocity_fn: VelocityFunction,
    noises: Sequence[Tensor],
    timesteps: Tensor,
    ode: bool = False,
    on_step: StepCallback | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Run the sampler.

    Args:
        velocity_fn: (latent float64, t in 0..1, step) -> velocity; any rounding is its own business.
        noises: standard normal tensors of the latent's shape. noises[0], scaled by timesteps[0], is the start; step i
            of the SDE adds timesteps[i + 1] * noises[i + 1]. The last one's weight is 0, so it may be missing.
            The ODE uses noises[0] only.
        timesteps: float64 [N + 1], falling to 0.
        ode: the deterministic update instead of fresh noise.
        on_step: called after each step with (step, latent, the time reached).
        start: the latent at timesteps[0], where earlier steps have been taken already; noises[0] is then not used.

    Returns:
        float32, the shape of noises[0].

    Raises:
        RequestError: too few noises.
    """
    times = timesteps.double().tolist()
    steps = len(times) - 1
    if len(noises) < (1 if ode else steps):
        raise RequestError(f"{steps} SDE steps need at least {steps} noise tensors, got {len(noises)}")
    x = noises[0].double() * times[0] if start is None else start.double()
    for i, (t, t_next) in enumerate(pairwise(times)):
        velocity = velocity_fn(x, t, i).double()
        if ode:
            x = x - (t - t_next) * velocity
        else:
            x = (1 - t_next) * (x - t * velocity)
            if t_next > 0:
                x = x + t_next * noises[i + 1]  # the product in the noise's own float32, as in the official code
        if on_step is not None:
            on_step(i, x, t_next)
    return x.float()
