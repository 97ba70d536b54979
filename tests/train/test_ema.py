"""The power average is the weighted mean that the paper says."""

from __future__ import annotations

import torch
from torch import nn

from turbowan.train.ema import PowerAverage, exponent


def test_the_exponent_gives_the_width_it_is_named_for():
    assert abs(exponent(0.1) - 6.93720394) < 1e-8  # TurboDiffusion's
    for width in (0.05, 0.15, 0.25):
        gamma = exponent(width)
        # a Beta(gamma + 1, 1) profile's standard deviation, which the paper calls the width
        variance = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))
        assert abs(variance**0.5 - width) < 1e-9


def test_the_average_weighs_old_weights_by_a_power_of_their_time(fresh_seed):
    layer = nn.Linear(3, 2)
    average = PowerAverage(layer, 0.1)
    history = []
    for update in range(300):
        with torch.no_grad():
            layer.weight.normal_()
        average.update(update)
        history.append(layer.weight.detach().double())
        if update == 0:
            assert torch.equal(average.values[0], layer.weight)
    shares = torch.tensor([(k + 1.0) ** (average.gamma + 1) - k ** (average.gamma + 1) for k in range(300)]).double()
    expected = (torch.stack(history) * (shares / shares.sum()).view(-1, 1, 1)).sum(dim=0)
    assert torch.allclose(average.values[0].double(), expected, rtol=2e-2, atol=2e-2)
