"""TurboDiffusion's time grid for ComfyUI's own samplers."""

from __future__ import annotations

from typing import Any

from .inputs import number, whole

SIGMA_TIP = "First noise level: 80 for text to video, 200 for image to video."


class TurboWanSigmas:
    """SIGMAS for SamplerCustom: `euler` with them is the ODE form of TurboDiffusion's sampler, `lcm` the SDE form."""

    DESCRIPTION = (
        "TurboDiffusion's 1 to 4 steps as SIGMAS, for SamplerCustom with KSamplerSelect 'lcm' (as published) or 'euler'"
        " (without fresh noise) and cfg 1. With two experts, give 'high' to the first sampler and 'low' to the second."
    )
    CATEGORY = "sampling/turbodiffusion"
    RETURN_TYPES = ("SIGMAS", "SIGMAS", "SIGMAS")
    RETURN_NAMES = ("all", "high", "low")
    OUTPUT_TOOLTIPS = ("All steps.", "The high-noise expert's steps.", "The low-noise expert's steps.")
    FUNCTION = "sigmas"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "num_steps": whole(4, 1, 4, "Evaluations of the model. 4 looks best, 1 and 2 are faster."),
                "sigma_max": number(80.0, 1.0, 1000.0, 0.1, SIGMA_TIP),
                "boundary": number(0.9, 0.0, 1.0, 0.001, "Time (0..1) from which on the high-noise expert works."),
            }
        }

    def sigmas(self, num_steps: int, sigma_max: float, boundary: float) -> tuple:
        from ..sampling import rcm
        from ..sampling.experts import switch_step

        times = rcm.timesteps(num_steps, sigma_max)
        switch = switch_step(times.tolist(), boundary)
        grid = times.float()
        # as ComfyUI's SplitSigmas: both parts hold the time in between; a part without steps is empty
        high, low = grid[: switch + 1] if switch else grid[:0], grid[switch:] if switch < num_steps else grid[:0]
        return grid, high, low
