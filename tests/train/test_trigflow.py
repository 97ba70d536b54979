"""TrigFlow around a rectified-flow network: what it is asked, and what follows from its velocity."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from turbowan.models.tokenizer import TEXT_LENGTH
from turbowan.train.data import Batch
from turbowan.train.trigflow import add_noise, angle, clean, predict, velocity

SHAPE = (3, 16, 2, 4, 6)


class Exact(nn.Module):
    """The velocity of a pair that it knows; keeps what it was asked."""

    def __init__(self, x0: Tensor, noise: Tensor) -> None:
        super().__init__()
        self.answer = noise - x0

    def forward(
        self, latent: Tensor, timestep: Tensor, text: Tensor, condition: Tensor | None, text_rows: int
    ) -> Tensor:
        self.asked = latent, timestep, text, condition, text_rows
        return self.answer


def pair() -> tuple[Tensor, Tensor, Tensor]:
    """A clean latent, noise, and times over the whole range."""
    tau = torch.tensor([1e-3, 0.5 + 0.5 * torch.rand(()).item(), math.pi / 2], dtype=torch.float64)
    return torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64), tau


def test_angle_is_the_arctangent_of_sigma(fresh_seed: int) -> None:
    t = torch.cat([torch.rand(50, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)])
    tau = angle(t)
    assert torch.allclose(tau.sin() / (tau.cos() + tau.sin()), t, atol=1e-15)
    assert torch.allclose(tau[:50], (t / (1 - t)).atan()[:50], atol=1e-15)
    assert tau[50:].tolist() == [0.0, math.pi / 2]


def test_noise_lies_on_the_circle(fresh_seed: int) -> None:
    x0, noise, tau = pair()
    x = add_noise(x0.float(), noise.float(), tau)
    assert x.dtype == torch.float64
    for row in range(3):
        expected = math.cos(tau[row]) * x0[row].float().double() + math.sin(tau[row]) * noise[row].float().double()
        assert torch.allclose(x[row], expected, atol=1e-14)


def test_f_and_the_clean_latent_of_an_exact_velocity(fresh_seed: int) -> None:
    x0, noise, tau = pair()
    net, batch = Exact(x0, noise), Batch(x0.float(), torch.randn(3, 5, 8), torch.randn(3, 20, 2, 4, 6))
    x = add_noise(x0, noise, tau)
    prediction = predict(net, x, tau, batch)
    cos, sin = tau.cos().view(-1, 1, 1, 1, 1), tau.sin().view(-1, 1, 1, 1, 1)
    assert prediction.dtype == torch.float64
    assert torch.allclose(prediction, cos * noise - sin * x0, atol=1e-13)  # d x_tau / d tau
    assert torch.allclose(clean(x, tau, prediction), x0, atol=1e-13)
    latent, timestep, text, condition, text_rows = net.asked
    t = (tau.sin() / (tau.cos() + tau.sin())).view(-1, 1, 1, 1, 1)
    assert latent.dtype == timestep.dtype == torch.float32
    assert torch.allclose(latent.double(), (1 - t) * x0 + t * noise, atol=1e-6)
    assert torch.allclose(timestep.double(), 1000 * t.flatten(), rtol=1e-6)
    assert text is not None
    assert torch.equal(text, batch.text)
    assert condition is batch.condition
    assert text_rows == TEXT_LENGTH


def test_another_text_stands_for_every_row(fresh_seed: int) -> None:
    x0, noise, _ = pair()
    net, negative = Exact(x0, noise), torch.randn(1, 7, 8)
    velocity(net, x0, torch.rand(3), Batch(x0, torch.randn(3, 5, 8)), negative)
    assert torch.equal(net.asked[2], negative.expand(3, -1, -1))
