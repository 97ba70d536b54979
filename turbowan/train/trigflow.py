"""TrigFlow over a rectified-flow network: x_tau = cos(tau) x0 + sin(tau) noise, tau in 0..pi/2.

The network sees t = sin / (cos + sin) and x / (cos + sin) and predicts the velocity v; of these follow
F = dx/dtau = ((cos - sin) x + v) / (cos + sin) and x0 = cos x - sin F. Coefficients and results are float64.
Source: Lu and Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models" (2024), as rCM uses it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.tokenizer import TEXT_LENGTH
from .data import Batch


def column(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1, 1)


def angle(t: Tensor) -> Tensor:
    """Time of the rectified flow, 0..1, to tau: arctan(t / (1 - t))."""
    return torch.atan2(t, 1 - t)


def add_noise(x0: Tensor, noise: Tensor, tau: Tensor) -> Tensor:
    """x_tau, float64 [B, 16, T, h, w]; tau: [B]."""
    tau = column(tau.double())
    return tau.cos() * x0 + tau.sin() * noise


def velocity(net: nn.Module, latent: Tensor, t: Tensor, batch: Batch, text: Tensor | None = None) -> Tensor:
    """The network's velocity at x_t = (1 - t) x0 + t noise, float32.

    Args:
        latent: [B, 16, T, h, w]. t: [B] in 0..1. batch: its text and condition. text: another text.
    """
    text = batch.text if text is None else text.expand(len(batch), -1, -1)
    return net(latent.float(), 1000 * t.float(), text, batch.condition, text_rows=TEXT_LENGTH)


def predict(net: nn.Module, x: Tensor, tau: Tensor, batch: Batch, text: Tensor | None = None) -> Tensor:
    """F, float64 [B, 16, T, h, w]. x: [B, 16, T, h, w]; tau: [B]."""
    cos, sin = tau.cos(), tau.sin()
    total = cos + sin
    v = velocity(net, x / column(total), sin / total, batch, text)
    return (column(cos - sin) * x + v) / column(total)


def clean(x: Tensor, tau: Tensor, prediction: Tensor) -> Tensor:
    """x0 from x_tau and F."""
    return column(tau.cos()) * x - column(tau.sin()) * prediction
