"""SLA fine-tuning: a network learns to predict with sparse-linear attention what it predicts with dense attention.

White-box form: the same weights, `proj_l` from zero, all of them trained; the loss is the mean squared difference of
the two predictions on noised samples. Source: Zhang et al., "SLA: Beyond Sparsity in Diffusion Transformers via
Fine-Tunable Sparse-Linear Attention" (2025), as TurboDiffusion trains it. Simplified: latents are taken as they are,
not decoded and encoded again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.transformer import AttentionConfig, WanTransformer
from ..sampling import rcm
from .config import check_counts, check_numbers, check_pair, check_positive
from .data import Batch, Draws
from .trigflow import column, velocity


@dataclass(frozen=True, kw_only=True)
class SLAConfig:
    """What is aligned, and at which noise."""

    top_k: float = 0.1
    blocks: tuple[tuple[int, int], ...] = ((64, 64),)  # (block_q, block_k), taken in turn from step to step
    time_mean: float = 1.5  # sigma = exp(mean + std * normal), t = sigma / (1 + sigma)
    time_std: float = 1.6
    sampler_share: float = 0.0  # share of rows at the times of the rcm sampler instead, for few-step teachers
    sampler_steps: int = 4
    sigma_max: float = 80.0
    noise_range: tuple[float, float] = (0.0, 1.0)  # an expert draws its times from its own

    def __post_init__(self) -> None:
        check_positive(self, ("time_std", "sigma_max"))
        check_counts(self, ("sampler_steps",))
        check_numbers(self, ("top_k", "time_mean", "sampler_share"))
        check_pair(self, "noise_range")
        low, high = self.noise_range
        if not 0 <= low < high <= 1:
            raise CheckpointError(f"noise_range must rise within 0..1, got {low} to {high}")
        pairs = self.blocks if isinstance(self.blocks, (list, tuple)) else ()
        if not pairs or any(not isinstance(pair, (list, tuple)) or [*map(type, pair)] != [int, int] for pair in pairs):
            raise CheckpointError(f"blocks must be pairs such as [[128, 64]], got {self.blocks}")
        for pair in self.blocks:  # what is out of range is refused, by the time grid too
            AttentionConfig("sla", self.top_k, *pair)
        rcm.timesteps(self.sampler_steps, self.sigma_max)


class SLA:
    """The method for the trainer.

    Args:
        student: with `proj_l`, all else equal to the teacher's at the start (`with_sla` makes it). teacher: dense.
    """

    def __init__(self, config: SLAConfig, student: WanTransformer, teacher: nn.Module) -> None:
        self.config, self.student, self.teacher = config, student, teacher
        self.trained: dict[str, nn.Module] = {"student": student}
        self.frozen: dict[str, nn.Module] = {"teacher": teacher}

    def trains(self, step: int) -> str:
        return "student"

    def losses(self, batch: Batch, step: int, draws: Draws) -> dict[str, Tensor]:
        """Mean squared difference of the predicted velocities, over all elements."""
        t = self._times(draws)
        noise = draws.normal(*batch.latents.shape[1:])
        x = (1 - column(t)) * batch.latents + column(t) * noise
        with torch.no_grad():
            target = velocity(self.teacher, x, t, batch)
        block_q, block_k = self.config.blocks[step % len(self.config.blocks)]
        self.student.attention = AttentionConfig("sla", self.config.top_k, block_q, block_k)
        return {"alignment": F.mse_loss(velocity(self.student, x, t, batch), target)}

    def _times(self, draws: Draws) -> Tensor:
        config = self.config
        low, high = config.noise_range
        t = torch.sigmoid(config.time_mean + config.time_std * draws.normal())
        if (low, high) != (0.0, 1.0):  # the same shape of distribution, within the range
            t = low + (high - low) * t
        grid = rcm.timesteps(config.sampler_steps, config.sigma_max)[:-1].float().to(t.device)
        grid = grid[(grid >= low) & (grid <= high)]
        pick, share = draws.uniform(), draws.uniform()
        if len(grid) == 0:
            return t
        return torch.where(share < config.sampler_share, grid[(pick * len(grid)).long()], t)


def with_sla(net: WanTransformer) -> WanTransformer:
    """The network with SLA in every self-attention, over the same weights; `proj_l` is zero where it has none yet."""
    if net.config.has_sla:
        return net
    with torch.device("meta"):
        student = WanTransformer(replace(net.config, has_sla=True), norms=net.norms)
    device = net.patch_embedding.bias.device
    zeros = {
        name: torch.zeros(parameter.shape, device=device)
        for name, parameter in student.named_parameters()
        if ".proj_l." in name
    }
    student.load_state_dict({**net.state_dict(), **zeros}, assign=True)
    return student
