"""rCM distillation: which net learns when and from what, the student's samples, and that it distils."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from turbowan.errors import TurbowanError
from turbowan.models.transformer import TransformerConfig, WanTransformer
from turbowan.sampling import rcm
from turbowan.train.data import Batch, Draws
from turbowan.train.rcm import RCM, RCMConfig
from turbowan.train.trainer import TrainerConfig, run
from turbowan.train.trigflow import angle, column

pytestmark = pytest.mark.usefixtures("fresh_seed")

CPU = torch.device("cpu")
SHAPE = (3, 16, 2, 2, 4)


class Asked(nn.Module):
    """A velocity that follows latent, time and text a little; keeps what it was asked, and if a gradient was wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.randn(SHAPE, dtype=torch.float64))
        self.calls: list[tuple[Tensor, Tensor, Tensor, bool]] = []

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, *_: object, text_rows: int) -> Tensor:
        t = column(timestep / 1000)
        velocity = self.answer + 0.3 * (latent + t).sin() + text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)
        self.calls.append((latent.detach(), t.detach(), velocity.detach(), torch.is_grad_enabled()))
        return velocity

    def clean(self) -> Tensor:
        """What it took for the clean latent in its last call."""
        latent, t, velocity, _ = self.calls[-1]
        return latent - t * velocity


def method_of(config: RCMConfig, kind: Callable[[], nn.Module] = Asked) -> RCM:
    return RCM(config, kind(), kind(), kind(), torch.ones(1, 2, 5))


def batch_of(image: bool = False) -> Batch:
    mask = torch.zeros(3, 4, *SHAPE[2:])
    mask[:, :, 0] = 1
    condition = torch.cat([mask, torch.randn(SHAPE)], dim=1) if image else None
    return Batch(torch.randn(SHAPE), torch.randn(3, 2, 5), condition)


def draws_of(step: int = 0, rows: int = 3) -> Draws:
    return Draws(11, step, range(rows), CPU)


# --- turns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "warmup"), [(1, 0), (2, 0), (3, 4), (5, 7)])
def test_student_and_critic_take_turns(every: int, warmup: int) -> None:
    method = method_of(RCMConfig(student_every=every, tangent_warmup=warmup))
    for step in range(60):
        student = step < warmup or (step - warmup) % every == 0
        assert method.trains(step) == ("student" if student else "critic")
    alone = method_of(RCMConfig(student_every=every, tangent_warmup=warmup, score_weight=0.0))
    assert set(alone.trained) == {"student"}
    assert {alone.trains(step) for step in range(60)} == {"student"}


@pytest.mark.parametrize(("every", "warmup"), [(2, 0), (3, 0), (5, 3)])
def test_each_net_meets_samples_of_each_number_of_steps(every: int, warmup: int) -> None:
    """One after another; a sample's last step alone has a gradient, where the student learns from it."""
    method = method_of(RCMConfig(student_every=every, tangent_warmup=warmup, guidance_scale=1.0))
    met: dict[str, list[int]] = {"student": [], "critic": []}
    for step in range(warmup, warmup + 6 * every):
        method.student.calls.clear()
        losses = method.losses(batch_of(), step, draws_of(step))
        sampled = method.student.calls[2 * ("consistency" in losses) :]  # its tangent and its prediction come before
        name = method.trains(step)
        assert [wanted for *_, wanted in sampled] == [False] * (len(sampled) - 1) + [name == "student"]
        met[name].append(len(sampled))
    for counts in met.values():
        assert set(counts) == {1, 2, 3, 4}
        assert all(after == before % 4 + 1 for before, after in pairwise(counts))


def test_a_step_changes_its_own_net_only() -> None:
    sizes = TransformerConfig(dim=128, ffn_dim=64, num_layers=1, text_dim=5, freq_dim=32, has_sla=True)
    method = method_of(RCMConfig(student_every=2, tangent_warmup=2, simulation_steps=2), lambda: WanTransformer(sizes))
    nets = {"student": method.student, "critic": method.critic, "teacher": method.teacher.requires_grad_(False)}
    consistency, both = {"consistency"}, {"consistency", "score"}
    for step, names in enumerate([consistency, consistency, both, {"critic"}, both, {"critic"}]):
        losses = method.losses(batch_of(), step, draws_of(step))
        assert set(losses) == names
        sum(losses.values()).backward()
        for name, net in nets.items():
            learns = name == method.trains(step)
            assert all((p.grad is not None and bool(p.grad.any())) == learns for p in net.parameters()), (step, name)
            net.zero_grad(set_to_none=True)


# --- losses -----------------------------------------------------------------------------------------------------------


def guided(teacher: Asked, scale: float) -> Tensor:
    """The clean latent of its last two calls, with and without the text."""
    (latent, t, wanted, _), (same, when, unwanted, _) = teacher.calls[-2:]
    assert torch.equal(latent, same)
    assert torch.equal(t, when)
    return latent - t * (unwanted + scale * (wanted - unwanted))


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("known", [0.0, 0.25])
def test_the_score_loss_pulls_from_critic_to_teacher(known: float) -> None:
    """d loss / d sample = 2 (critic - teacher) / mean |sample - teacher|, and of the known frame towards the image."""
    config = RCMConfig(guidance_scale=3.5, consistency_weight=0.0, score_weight=2.0, known_frame_weight=known)
    method, batch = method_of(config), batch_of(image=True)
    for step in range(0, 4 * config.student_every, config.student_every):
        method.student.zero_grad()
        loss = method.losses(batch, step, draws_of(step))["score"]
        loss.backward()
        made, when = method.student.clean(), method.student.calls[-1][1]
        noised, t, _, _ = method.critic.calls[-1]
        assert torch.equal(noised, method.teacher.calls[-1][0])
        noise = (noised - (1 - t) * made) / t
        assert abs(noise.mean().item()) < 0.2
        assert abs(noise.std().item() - 1) < 0.2
        teacher = guided(method.teacher, 3.5)
        weight = (made - teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        apart = (method.critic.clean() - teacher) / weight
        off = torch.zeros_like(made)
        off[:, :, 0] = (made - batch.condition[:, 4:])[:, :, 0]
        assert loss.item() == pytest.approx(2 * (apart.square() + known * off.square()).sum().item() / 3, rel=1e-9)
        expected = 2 * 2 * (apart + known * off) / 3 * -when  # the sample moves with the velocity by -t
        assert torch.allclose(method.student.answer.grad, expected, atol=1e-10)


@pytest.mark.usefixtures("in_float64")
def test_the_critic_learns_the_students_samples() -> None:
    """(its clean latent - sample)^2 / sin^2, of the sample noised."""
    method = method_of(RCMConfig(guidance_scale=3.0))
    loss = method.losses(batch_of(), 1, draws_of(1))["critic"]
    loss.backward()
    made, (_, t, _, _) = method.student.clean(), method.critic.calls[-1]
    off, sin = method.critic.clean() - made, angle(t).sin()
    assert loss.item() == pytest.approx((off / sin).square().sum().item() / 3, rel=1e-9)
    assert torch.allclose(method.critic.answer.grad, -2 * t * off / sin.square() / 3, atol=1e-10)


def test_guidance_of_one_asks_the_teacher_once() -> None:
    for scale, calls in ((1.0, 1), (4.0, 2)):
        method = method_of(RCMConfig(guidance_scale=scale, score_weight=0.0))
        method.losses(batch_of(), 0, draws_of())
        assert len(method.teacher.calls) == calls


def test_a_row_that_is_no_number_counts_nothing() -> None:
    """Of the teacher's three answers one is NaN: the other rows teach what they teach without it."""
    method, batch = method_of(RCMConfig()), batch_of()
    gradients, losses = [], []
    for bad in (False, True):
        if bad:
            method.teacher.answer.data[1, 3, 0, 1, 1] = math.nan
        method.student.zero_grad()
        found = method.losses(batch, 0, draws_of())
        sum(found.values()).backward()
        gradients.append(method.student.answer.grad.clone())
        losses.append({name: value.item() for name, value in found.items()})
    assert torch.equal(gradients[0][::2], gradients[1][::2])
    assert gradients[0][1].any()
    assert not gradients[1][1].any()
    assert all(0 < losses[1][name] < value for name, value in losses[0].items())


# --- times and samples ------------------------------------------------------------------------------------------------


class Recording(Draws):
    """Keeps the noise it gives."""

    def normal(self, *shape: int) -> Tensor:
        self.noises = [*getattr(self, "noises", []), super().normal(*shape)]
        return self.noises[-1]


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_samples_are_the_samplers(steps: int) -> None:
    """With the sampler's times the student's samples are what `rcm.sample` makes of the same noise."""
    config = RCMConfig(simulation_times="sampler", sigma_max=120.0)
    method, batch, draws = method_of(config), batch_of(), Recording(5, 0, range(3), CPU)
    with torch.no_grad():
        made = method._simulate(batch, steps, draws, gradient=False)
        expected = rcm.sample(
            lambda latent, t, _: method.student(latent, torch.full((3,), 1000 * t), batch.text, text_rows=512),
            draws.noises, rcm.timesteps(steps, 120.0),
        )  # fmt: skip
    assert len(draws.noises) == steps
    assert torch.allclose(made, expected, atol=1e-6)


def test_drawn_times_fall_from_pure_noise() -> None:
    method, draws = method_of(RCMConfig(score_shift=5.0)), draws_of(rows=2000)
    times = torch.stack(method._simulation_times(4, draws))
    assert (times[0] == math.pi / 2).all()
    assert (times[1:] <= times[:-1]).all()
    assert (times > 0).all()
    t = times[1:].sin() / (times[1:].sin() + times[1:].cos())
    uniform = t / (5 - 4 * t)  # what 5 u / (1 + 4 u) was made of
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.03)
    assert uniform.square().mean().item() == pytest.approx(1 / 3, abs=0.03)


def test_consistency_times_are_log_normal() -> None:
    method = method_of(RCMConfig(consistency_mean=0.4, consistency_std=1.3))
    log_sigma = method._consistency_time(0, draws_of(rows=4000)).tan().log()
    assert log_sigma.mean().item() == pytest.approx(0.4, abs=0.12)
    assert log_sigma.std().item() == pytest.approx(1.3, abs=0.1)


@pytest.mark.parametrize("boundary", [0.3, 0.9, 0.97])
def test_consistency_times_lie_on_the_experts_side(boundary: float) -> None:
    """High and low in turn, each with its own part of the one distribution."""
    method = method_of(RCMConfig(boundary=boundary, simulation_times="sampler", consistency_std=1.0))
    tau = [method._consistency_time(turn, draws_of(turn, rows=1500)) for turn in range(4)]
    t = [each.sin() / (each.sin() + each.cos()) for each in tau]
    assert min(t[0].min(), t[2].min()) >= boundary >= max(t[1].max(), t[3].max())
    log_sigma = math.log(boundary / (1 - boundary)) - 0.7
    share = 0.5 * math.erfc(log_sigma / 2**0.5)
    density = math.exp(-(log_sigma**2) / 2) / (2 * math.pi) ** 0.5
    for each, mean in ((tau[0], density / share), (tau[1], -density / (1 - share))):  # of a normal beyond a bound
        assert each.tan().log().mean().item() - 0.7 == pytest.approx(mean, abs=0.15)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"simulation_times": "paper"}, "simulation_times must be one of drawn, sampler, got 'paper'"),
        ({"student_every": 0}, "student_every must be a positive number, got 0"),
        ({"consistency_std": -1.0}, "consistency_std must be a positive number, got -1.0"),
        ({"boundary": 0.9}, "needs simulation_times 'sampler'; got 0.9 with 'drawn'"),
        ({"boundary": 1.5, "simulation_times": "sampler"}, "a boundary lies between 0 and 1"),
        ({"simulation_steps": 5, "simulation_times": "sampler"}, "the rcm sampler takes 1 to 4 steps, got 5"),
        ({"sigma_max": 5.0, "simulation_times": "sampler"}, "sigma_max must exceed 14.1 for 4 steps, got 5.0"),
        ({"top_k": 1.5}, "sla_topk must be in (0, 1], got 1.5"),
        ({"consistency_weight": 0.0, "score_weight": 0.0}, "consistency_weight 0 needs a score_weight"),
        ({"consistency_weight": 0.0, "tangent_warmup": 5}, "no tangent_warmup: its steps have no other loss"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings: dict, said: str) -> None:
    with pytest.raises(TurbowanError) as error:
        RCMConfig(**settings)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


# --- it distils -------------------------------------------------------------------------------------------------------


class TwoHills(nn.Module):
    """The exact velocity for values around -0.8 and 0.8 with deviation 0.6, plus what a small net learned to add."""

    def __init__(self) -> None:
        super().__init__()
        self.added = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        nn.init.zeros_(self.added[-1].weight)
        nn.init.zeros_(self.added[-1].bias)

    def forward(self, latent: Tensor, timestep: Tensor, *_: object, text_rows: int = 1) -> Tensor:
        t = column(timestep / 1000)
        variance = (0.6 * (1 - t)).square() + t.square()
        side = torch.tanh(0.8 * (1 - t) * latent / variance)
        x0 = (0.36 * (1 - t) * latent + 0.8 * side * t.square()) / variance
        return (latent - x0) / t + self.added(torch.stack([latent, t.expand_as(latent)], dim=-1)).squeeze(-1)


class Hills:
    """Such values, row by row."""

    negative = torch.zeros(1, 1, 1)

    def batch(self, step: int, rows: range) -> Batch:
        draws = Draws(5, step, rows, CPU)
        values = 0.8 * draws.normal(16, 1, 2, 2).sign() + 0.6 * draws.normal(16, 1, 2, 2)
        return Batch(values, torch.zeros(len(rows), 1, 1))


@pytest.mark.parametrize(
    "weights", [{}, {"score_weight": 0.0}, {"consistency_weight": 0.0}], ids=["both", "consistency", "score"]
)
def test_one_step_learns_what_the_teacher_needs_many_for(weights: dict, tmp_path: Path) -> None:
    """From noise to the place where the teacher's flow ends, which one step of the teacher misses by a lot."""
    nets = TwoHills(), TwoHills(), TwoHills()
    source, noise = Hills(), torch.randn(100, 16, 1, 2, 2)

    @torch.no_grad()
    def follow(net: nn.Module, times: Tensor) -> Tensor:
        return rcm.sample(lambda x, t, _: net(x.float(), torch.full((100,), 1000 * t), None), [noise], times, ode=True)

    once, often = (torch.linspace(1, 0, steps + 1, dtype=torch.float64) for steps in (1, 100))
    wanted = follow(nets[1], often)
    before = (follow(nets[0], once) - wanted).square().mean().item()
    method = RCM(RCMConfig(guidance_scale=1.0, student_every=2, **weights), *nets, source.negative)
    rates = dict.fromkeys(method.trained, 3e-3)
    settings = TrainerConfig(steps=200, batch=16, lr=rates, betas=(0.0, 0.99), warmup=10, ema=0.0, log_steps=100)
    run(method, source, settings, tmp_path, CPU)
    after = (follow(nets[0], once) - wanted).square().mean().item()
    print(f"mean squared error of one step: {before:.3f} before, {after:.4f} after")
    assert after < 0.1 * before  # 0.005 to 0.04 of it was seen
