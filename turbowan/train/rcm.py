"""rCM distillation: a many-step teacher becomes a student of one to four steps.

Two losses on the student: the continuous-time consistency loss, whose target is the tangent of the student along the
teacher's trajectory, and score distillation (DMD), which compares the teacher's and a critic's denoising of what the
student makes. The critic, a copy of the teacher, learns the student's own distribution in the steps between.

Source: Zheng et al., "Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency" (2025),
with the settings of NVlabs/rcm and TurboDiffusion. Simplified: the whole tangent comes from PyTorch's forward-mode AD
instead of layer-wise pairs (attention by its plain formula there); latents are taken as they are, not decoded and
encoded again; the discrete form (dCM) and finite differences are left out. Ours: two experts as one student, and for
image-to-video a pull of the first frame towards the image (`known_frame_weight`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import CheckpointError
from ..models.transformer import AttentionConfig
from ..sampling import rcm
from .config import check_counts, check_numbers, check_positive, check_whole
from .data import Batch, Draws
from .trigflow import add_noise, angle, clean, column, predict

TIMES = ("drawn", "sampler")


@dataclass(frozen=True, kw_only=True)
class RCMConfig:
    """The losses. Times by rectified flow are t in 0..1."""

    guidance_scale: float = 5.0  # folded into the teacher
    student_every: int = 5  # one student step, then the critic's
    tangent_warmup: int = 0  # steps, all of the student's, over which the tangent is brought in; no critic before
    consistency_weight: float = 100.0
    score_weight: float = 1.0
    consistency_mean: float = 0.7  # sigma = exp(mean + std * normal)
    consistency_std: float = 1.6
    score_shift: float = 5.0  # t = shift u / (1 + (shift - 1) u), u uniform
    known_frame_weight: float = 0.0  # of the first frame's squared distance to the image it was given, in score steps
    simulation_steps: int = 4  # the student's samples take 1 to so many
    simulation_times: str = "drawn"  # times between: "drawn" as the score's, or "sampler", those of the rcm sampler
    sigma_max: float = 80.0  # where "sampler" starts; "drawn" starts at pure noise
    sla: bool = False  # give the student SLA, proj_l from zero, if it has none yet
    top_k: float = 0.1  # of a student with SLA
    boundary: float | None = None  # two experts: from this time on the high-noise one predicts

    def __post_init__(self) -> None:
        check_counts(self, ("student_every", "simulation_steps"))
        check_whole(self, ("tangent_warmup",))
        check_positive(self, ("consistency_std", "score_shift", "sigma_max"))
        check_numbers(self, ("consistency_weight", "score_weight", "known_frame_weight"), least=0)
        numbers = ("guidance_scale", "consistency_mean", "top_k")
        check_numbers(self, numbers if self.boundary is None else (*numbers, "boundary"))
        if self.simulation_times not in TIMES:
            raise CheckpointError(f"simulation_times must be one of {', '.join(TIMES)}, got '{self.simulation_times}'")
        AttentionConfig("sla", self.top_k)  # refuses what is out of its range, as the time grid does
        if self.simulation_times == "sampler":
            rcm.timesteps(self.simulation_steps, self.sigma_max)
        if not self.consistency_weight and (not self.score_weight or self.tangent_warmup):
            raise CheckpointError(
                "consistency_weight 0 needs a score_weight and no tangent_warmup: its steps have no other loss; got"
                f" {self.score_weight} and {self.tangent_warmup}"
            )
        if self.boundary is not None and (not 0 < self.boundary < 1 or self.simulation_times != "sampler"):
            raise CheckpointError(
                f"a boundary lies between 0 and 1 and needs simulation_times 'sampler'; got {self.boundary} with"
                f" '{self.simulation_times}'"
            )


class RCM:
    """The method for the trainer.

    Args:
        student, teacher, critic: equal weights at the start. negative: [1, L, D], the unconditional text.
    """

    def __init__(
        self, config: RCMConfig, student: nn.Module, teacher: nn.Module, critic: nn.Module, negative: Tensor
    ) -> None:
        self.config, self.negative = config, negative
        self.student, self.teacher, self.critic = student, teacher, critic
        self.trained: dict[str, nn.Module] = {"student": student}
        if config.score_weight:
            self.trained["critic"] = critic
        self.frozen: dict[str, nn.Module] = {"teacher": teacher}

    def trains(self, step: int) -> str:
        after = step - self.config.tangent_warmup
        student = "critic" not in self.trained or after < 0 or after % self.config.student_every == 0
        return "student" if student else "critic"

    def losses(self, batch: Batch, step: int, draws: Draws) -> dict[str, Tensor]:
        """Means over rows of the losses, each summed over a row's elements."""
        steps = self._turn(step) % self.config.simulation_steps + 1
        if self.trains(step) == "critic":
            return {"critic": self._critic_loss(batch, steps, draws)}
        losses = {}
        if self.config.consistency_weight:
            losses["consistency"] = self.config.consistency_weight * self._consistency_loss(batch, step, draws)
        if "critic" in self.trained and step >= self.config.tangent_warmup:
            losses["score"] = self.config.score_weight * self._score_loss(batch, steps, draws)
        return losses

    def _turn(self, step: int) -> int:
        """How many steps before this one trained the same net, so that each net meets all that goes by turns."""
        if "critic" not in self.trained:
            return step
        after = max(0, step - self.config.tangent_warmup)
        students = min(step, self.config.tangent_warmup) + math.ceil(after / self.config.student_every)
        return students if self.trains(step) == "student" else step - students

    @torch.no_grad()
    def _guided(self, x: Tensor, tau: Tensor, batch: Batch) -> Tensor:
        """The teacher's F with guidance."""
        wanted = predict(self.teacher, x, tau, batch)
        if self.config.guidance_scale == 1:
            return wanted
        unwanted = predict(self.teacher, x, tau, batch, self.negative)
        return unwanted + self.config.guidance_scale * (wanted - unwanted)

    def _consistency_loss(self, batch: Batch, step: int, draws: Draws) -> Tensor:
        config = self.config
        tau = self._consistency_time(self._turn(step), draws)
        x = add_noise(batch.latents, draws.normal(*batch.latents.shape[1:]), tau)
        target = self._guided(x, tau, batch)
        warmth = min(1.0, step / config.tangent_warmup) if config.tangent_warmup else 1.0
        rate = tau.cos() * tau.sin()
        tangent = student_tangent(self.student, x, tau, batch, column(rate) * target, rate)
        prediction = predict(self.student, x, tau, batch)
        goal = consistency_direction(x, tau, prediction.detach(), target, tangent, warmth)
        return _mean_square(prediction - prediction.detach() - goal)

    def _consistency_time(self, turn: int, draws: Draws) -> Tensor:
        """Log-normal in sigma; with two experts, of the part of it that is the high one's and the low one's in turn."""
        config = self.config
        low, high = 0.0, 1.0
        if config.boundary is not None:
            log_sigma = math.log(config.boundary / (1 - config.boundary))
            share = 0.5 * math.erfc((log_sigma - config.consistency_mean) / config.consistency_std / 2**0.5)
            low, high = (1 - share, 1.0) if turn % 2 == 0 else (0.0, 1 - share)
        u = low + (high - low) * draws.uniform().double()
        normal = torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4))
        return (config.consistency_mean + config.consistency_std * normal).exp().atan()

    def _simulate(self, batch: Batch, steps: int, draws: Draws, gradient: bool) -> Tensor:
        """What the student makes of noise in so many steps; a gradient, if wanted, through the last one only."""
        shape = batch.latents.shape[1:]
        times = self._simulation_times(steps, draws)
        x0 = torch.zeros((), device=draws.device)
        for i, tau in enumerate(times):
            x = add_noise(x0, draws.normal(*shape), tau)
            with torch.set_grad_enabled(gradient and i == steps - 1):
                x0 = clean(x, tau, predict(self.student, x, tau, batch))
        return x0

    def _simulation_times(self, steps: int, draws: Draws) -> list[Tensor]:
        """Where the steps start: falling times [B]."""
        if self.config.simulation_times == "sampler":
            t = angle(rcm.timesteps(steps, self.config.sigma_max)[:-1]).to(draws.device)
            return list(t[:, None].expand(-1, len(draws)))
        first = torch.full((len(draws),), math.pi / 2, dtype=torch.float64, device=draws.device)
        drawn = torch.stack([first, *(self._score_time(draws) for _ in range(steps - 1))])
        return list(drawn.sort(dim=0, descending=True).values)

    def _score_time(self, draws: Draws) -> Tensor:
        u = draws.uniform().double().clamp(min=1e-6)
        return angle(self.config.score_shift * u / (1 + (self.config.score_shift - 1) * u))

    def _score_loss(self, batch: Batch, steps: int, draws: Draws) -> Tensor:
        made = self._simulate(batch, steps, draws, gradient=True)
        with torch.no_grad():
            tau = self._score_time(draws)
            x = add_noise(made, draws.normal(*made.shape[1:]), tau)
            critic = clean(x, tau, predict(self.critic, x, tau, batch))
            teacher = clean(x, tau, self._guided(x, tau, batch))
            weight = (made - teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp(min=1e-5)
            goal = made - _finite_rows((critic - teacher) / weight)
        loss = _mean_square(made - goal)
        if self.config.known_frame_weight and batch.condition is not None:
            known, image = batch.condition[:, :1], batch.condition[:, 4:]
            loss = loss + self.config.known_frame_weight * _mean_square(known * (made - image))
        return loss

    def _critic_loss(self, batch: Batch, steps: int, draws: Draws) -> Tensor:
        with torch.no_grad():
            made = self._simulate(batch, steps, draws, gradient=False)
        tau = self._score_time(draws)
        x = add_noise(made, draws.normal(*made.shape[1:]), tau)
        error = clean(x, tau, predict(self.critic, x, tau, batch)) - made
        return _mean_square(error / column(tau.sin()))


@torch.no_grad()
def student_tangent(net: nn.Module, x: Tensor, tau: Tensor, batch: Batch, dx: Tensor, dtau: Tensor) -> Tensor:
    """The change of the network's F along (dx, dtau), by forward-mode AD: float64 [B, 16, T, h, w].

    Args:
        x, dx: [B, 16, T, h, w]. tau, dtau: [B], float64.
    """
    with torch.compiler.set_stance("force_eager"), forward_ad.dual_level():
        moving = predict(net, forward_ad.make_dual(x, dx), forward_ad.make_dual(tau, dtau), batch)
        tangent = forward_ad.unpack_dual(moving).tangent
    assert tangent is not None
    return tangent


def consistency_direction(
    x: Tensor, tau: Tensor, prediction: Tensor, target: Tensor, tangent: Tensor, warmth: float = 1.0
) -> Tensor:
    """Where the consistency loss moves F: the normalised tangent of the student's clean latent, float64.

    Args:
        x: x_tau. prediction, target: F of student and teacher. tangent: d F along the teacher's trajectory times
            cos sin. warmth: r in 0..1. A row that is not finite gets 0.
    """
    cos, sin = column(tau.cos()), column(tau.sin())
    g = -cos * (1 - warmth**2 * sin.square()).clamp(min=0).sqrt() * (prediction - target)
    g = g - (warmth * cos * sin * x + tangent)
    return _finite_rows(g / (g.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1) + 0.1))


def _finite_rows(values: Tensor) -> Tensor:
    """The same with 0 in every row that is not finite."""
    finite = values.flatten(1).isfinite().all(dim=1)
    return torch.where(column(finite), values, 0.0)


def _mean_square(difference: Tensor) -> Tensor:
    """Mean over rows of the sum of squares; a row that is not finite counts 0, and so does its gradient here.

    If a trained network itself made it so, its weights' gradients are lost with it; the trainer takes them for 0.
    """
    return _finite_rows(difference).square().flatten(1).sum(dim=1).mean()
