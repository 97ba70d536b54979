"""RMSNorm over the last axis."""

import pytest
import torch
import torch.nn.functional as F

from turbowan import ops

pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.mark.parametrize("width", [1, 64, 384])
def test_is_pytorchs(width):
    x, weight = torch.randn(2, 5, width) * 4, torch.randn(width)
    assert torch.allclose(ops.rms_norm(x, weight, 1e-5), F.rms_norm(x, (width,), weight, 1e-5), atol=2e-6)


def test_is_rounded_once_after_the_weight():
    x, weight = torch.randn(50, 384).bfloat16(), torch.randn(384)
    wide = x.double()
    exact = wide * (wide.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    ours = ops.rms_norm(x, weight)
    assert ours.dtype == torch.bfloat16
    assert torch.allclose(ours.double(), exact, rtol=0.004, atol=1e-30)


def test_rows_of_zeros_stay_zero():
    assert torch.equal(ops.rms_norm(torch.zeros(2, 8), torch.ones(8)), torch.zeros(2, 8))
