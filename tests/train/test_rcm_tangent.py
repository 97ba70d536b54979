"""The consistency loss of rCM: the student's tangent against finite differences, its direction against the formula."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from turbowan.models.transformer import AttentionConfig, TransformerConfig, WanTransformer
from turbowan.train.data import Batch, Draws
from turbowan.train.experts import Experts
from turbowan.train.rcm import RCM, RCMConfig, consistency_direction, student_tangent
from turbowan.train.trigflow import add_noise, column, predict

pytestmark = pytest.mark.usefixtures("fresh_seed")

CPU = torch.device("cpu")
SIZES = TransformerConfig(dim=256, ffn_dim=192, num_layers=2, text_dim=24, freq_dim=64, has_sla=True)
SLA = AttentionConfig("sla", 0.3, 64, 32)  # 168 tokens: 3 blocks of queries, 6 of keys, of which one is kept
SHAPE = (2, 16, 3, 14, 16)


def stirred(how: AttentionConfig) -> WanTransformer:
    """A transformer in which norms and biases count, too."""
    net = WanTransformer(SIZES, how)
    for parameter in net.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return net


@pytest.fixture
def held_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass selects the blocks that the first one did: as the tangent has it, which holds the selection fixed."""
    module = importlib.import_module("turbowan.ops.sparse_linear_attention")
    select, kept, calls = module.block_map, [], []

    def held(*args: object) -> Tensor:
        calls.append(args)
        turn = (len(calls) - 1) % SIZES.num_layers
        if turn == len(kept):
            kept.append(select(*args))
        return kept[turn]

    monkeypatch.setattr(module, "block_map", held)


class Course:
    """Where a consistency step takes the tangent: a point, and the direction in which latent and time move."""

    def __init__(self) -> None:
        self.x, move = torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
        self.tau = 0.2 + 1.2 * torch.rand(2, dtype=torch.float64)
        self.dtau = self.tau.cos() * self.tau.sin()
        self.dx = column(self.dtau) * move
        self.batch = Batch(self.x, torch.randn(2, 5, 24))

    def tangent(self, net: nn.Module) -> Tensor:
        return student_tangent(net, self.x, self.tau, self.batch, self.dx, self.dtau)

    @torch.no_grad()
    def difference(self, net: nn.Module, step: float) -> Tensor:
        ahead, behind = (
            predict(net, self.x + s * self.dx, self.tau + s * self.dtau, self.batch) for s in (step, -step)
        )
        return (ahead - behind) / (2 * step)


@pytest.mark.usefixtures("held_selection")
@pytest.mark.parametrize("student", ["dense", "sla", "experts"])
def test_the_tangent_is_the_difference(
    student: str, request: pytest.FixtureRequest, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    """The whole transformer, time embedding included: in float32 as it trains, and in float64 throughout."""
    net: nn.Module = stirred(SLA if student == "sla" else AttentionConfig("original"))
    net = Experts(net, 0.5) if student == "experts" else net
    course = Course()
    if student == "experts":  # which of them predicts must not change along the way
        course.tau = torch.tensor([0.9, 1.3], dtype=torch.float64)
    as_trained = course.tangent(net)
    assert as_trained.dtype == torch.float64
    assert all(parameter.grad_fn is None for parameter in (as_trained, *net.parameters()))
    request.getfixturevalue("in_float64")
    net.double()
    exact, errors = course.tangent(net), []
    for step in (1e-4, 1e-5, 1e-6):
        errors.append(relative_error(exact, course.difference(net, step)))
    assert errors[-1] <= 1e-6  # the bar is 1e-4; 7e-9 was seen
    assert errors[1] < 0.05 * errors[0]  # by 100, as of a true derivative
    assert relative_error(as_trained, exact) <= 1e-4


def formula(x: Tensor, tau: Tensor, ours: Tensor, teacher: Tensor, jvp: Tensor, r: float) -> Tensor:
    """g = -c sqrt(1 - r^2 s^2) (F - F_T) - (r c s x + J), g / (|g| + 0.1), row by row."""
    rows = []
    for i in range(len(x)):
        c, s = float(tau[i].cos()), float(tau[i].sin())
        g = -c * (1 - r**2 * s**2) ** 0.5 * (ours[i] - teacher[i]) - (r * c * s * x[i] + jvp[i])
        rows.append(g / (g.square().sum().sqrt() + 0.1))
    return torch.stack(rows)


@pytest.mark.parametrize("warmth", [0.0, 0.37, 1.0])
def test_the_direction_is_the_papers(warmth: float) -> None:
    x, ours, teacher, jvp = (torch.randn(4, 16, 2, 2, 4, dtype=torch.float64) for _ in range(4))
    tau = torch.tensor([0.01, 0.8, 1.5, torch.pi / 2], dtype=torch.float64)
    found = consistency_direction(x, tau, ours, teacher, jvp, warmth)
    assert torch.allclose(found, formula(x, tau, ours, teacher, jvp, warmth), atol=1e-14)
    assert (found.flatten(1).norm(dim=1) < 1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_number_moves_nothing(bad: float) -> None:
    x, ours, teacher, jvp = (torch.randn(3, 16, 1, 2, 2, dtype=torch.float64) for _ in range(4))
    tau = torch.rand(3, dtype=torch.float64)
    whole = consistency_direction(x, tau, ours, teacher, jvp)
    teacher[0, 3, 0, 1, 1] = jvp[2, 5, 0, 0, 0] = bad
    found = consistency_direction(x, tau, ours, teacher, jvp)
    assert not found[0].any()
    assert torch.equal(found[1], whole[1])
    assert not found[2].any()


class Gaussian(nn.Module):
    """The exact velocity for independent values of mean 0, with a standard deviation for each channel.

    solved: not that of the flow but the velocity whose clean latent is the end of the flow, the consistency function:
    x std / sqrt(variance) at all times.
    """

    def __init__(self, std: Tensor, solved: bool) -> None:
        super().__init__()
        self.std, self.solved = nn.Parameter(std.view(-1, 1, 1, 1)), solved

    def forward(self, latent: Tensor, timestep: Tensor, *_: object, text_rows: int) -> Tensor:
        t = column(timestep / 1000)
        variance = ((1 - t) * self.std).square() + t.square()
        if self.solved:
            return (latent - latent * self.std / variance.sqrt()) / t
        return latent * (t - (1 - t) * self.std.square()) / variance


@pytest.mark.usefixtures("in_float64")
def test_the_exact_consistency_function_is_left_where_it_is() -> None:
    """Known in closed form for Gaussian data: along the teacher's flow its tangent vanishes, a student's does not."""
    std = 0.1 + 2 * torch.rand(16, dtype=torch.float64)
    teacher, solved = Gaussian(std, False), Gaussian(std, True)
    batch = Batch(std.view(-1, 1, 1, 1) * torch.randn(8, 16, 2, 4, 4), torch.zeros(8, 1, 1))
    tau = 0.02 + 1.53 * torch.rand(8, dtype=torch.float64)
    found = {}
    for name, student in (("solved", solved), ("teacher", teacher)):
        x = add_noise(batch.latents, torch.randn_like(batch.latents), tau)
        with torch.no_grad():
            ours, target = predict(student, x, tau, batch), predict(teacher, x, tau, batch)
        rate = tau.cos() * tau.sin()
        tangent = student_tangent(student, x, tau, batch, column(rate) * target, rate)
        found[name] = consistency_direction(x, tau, ours, target, tangent).flatten(1).norm(dim=1)
    print(f"directions: of the solution {found['solved'].max():.1e}, of the teacher {found['teacher'].min():.2f}")
    assert found["solved"].max() <= 1e-10
    assert found["teacher"].min() > 0.02
    for student, low, high in ((solved, 0.0, 1e-18), (teacher, 1.0, 100.0)):
        method = RCM(RCMConfig(guidance_scale=1.0, score_weight=0.0), student, teacher, teacher, batch.text[:1])
        assert low <= method.losses(batch, 0, Draws(0, 0, range(8), CPU))["consistency"].item() <= high


class Fixed(nn.Module):
    """One velocity for each row, whatever it is asked; keeps the latents and times it was asked for last."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, latent: Tensor, timestep: Tensor, *_: object, text_rows: int) -> Tensor:
        self.latent, self.t = latent, timestep / 1000
        return self.answer


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("step", "warmth"), [(0, 0.0), (3, 0.3), (10, 1.0), (40, 1.0)])
def test_the_loss_pulls_along_the_direction(step: int, warmth: float) -> None:
    """Of a student whose velocity is its parameter all is known: F, its tangent, and how F moves with it."""
    shape = (3, 16, 1, 2, 4)
    student, teacher = Fixed(*shape), Fixed(*shape)
    config = RCMConfig(guidance_scale=1.0, score_weight=0.0, tangent_warmup=10, consistency_weight=7.0)
    batch = Batch(torch.randn(shape), torch.zeros(3, 1, 1))
    method = RCM(config, student, teacher, teacher, batch.text[:1])
    loss = method.losses(batch, step, Draws(1, step, range(3), CPU))["consistency"]
    loss.backward()

    t = teacher.t
    tau = torch.atan2(t, 1 - t)
    c, s = column(tau.cos()), column(tau.sin())
    x = teacher.latent * (c + s)
    ours, target = (((c - s) * x + net.answer.detach()) / (c + s) for net in (student, teacher))
    by_time = -2 * x / (c + s).square() - student.answer.detach() * (c - s) / (c + s).square()
    jvp = c * s * ((c - s) / (c + s) * target + by_time)
    g = formula(x, tau, ours, target, jvp, warmth)
    assert loss.item() == pytest.approx(7 * float(g.square().sum()) / 3, rel=1e-9)
    assert student.answer.grad is not None
    assert torch.allclose(student.answer.grad, -2 * 7 * g / (c + s) / 3, atol=1e-10)
