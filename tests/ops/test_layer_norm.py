"""LayerNorm, exact as PyTorch's and with the variance of the official fast kernel."""

import pytest
import torch
import torch.nn.functional as F

from turbowan import ops
from turbowan.errors import RequestError

pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.mark.parametrize("width", [1, 64, 384, 1000])
@pytest.mark.parametrize("affine", [True, False])
def test_exact_is_pytorchs(width, affine, relative_error):
    x = torch.randn(2, 5, width) * 3 + torch.randn(2, 5, 1)
    parts = (torch.randn(width), torch.randn(width)) if affine else (None, None)
    ours = ops.layer_norm(x, *parts, eps=1e-5)
    assert torch.allclose(ours, F.layer_norm(x, (width,), *parts, eps=1e-5), atol=2e-5)


def test_is_computed_in_float32_and_rounded_once():
    x = (torch.randn(4, 384) * 0.1 + 30).bfloat16()
    weight, bias = torch.randn(384), torch.randn(384)
    ours = ops.layer_norm(x, weight, bias)
    assert ours.dtype == torch.bfloat16
    exact = F.layer_norm(x.double(), (384,), weight.double(), bias.double(), eps=1e-6)
    assert torch.allclose(ours.double(), exact, rtol=0.004, atol=1e-4)


@pytest.mark.parametrize(("width", "padded"), [(5, 8), (384, 512), (1536, 2048), (5120, 8192), (256, 256), (1, 1)])
def test_official_variance_counts_the_padding(width, padded):
    """The fast kernel pads a row with zeros to the next power of two and counts (0 - mean)^2 for each of them."""
    x = (torch.randn(3, width, dtype=torch.float64) + 2 * torch.randn(3, 1, dtype=torch.float64)).float()
    wide = x.double()
    mean = wide.mean(dim=-1, keepdim=True)
    filled = torch.cat([wide, torch.zeros(3, padded - width)], dim=-1)
    variance = (filled - mean).square().sum(dim=-1, keepdim=True) / width
    expected = (wide - mean) / (variance + 1e-6).sqrt()
    assert torch.allclose(ops.layer_norm(x, variance="official").double(), expected, atol=1e-5)
    same = torch.equal(ops.layer_norm(x, variance="official"), ops.layer_norm(x))
    assert same == (width == padded)


def test_refuses_an_unknown_variance():
    with pytest.raises(RequestError, match="norms must be one of exact, official, got 'fast'"):
        ops.layer_norm(torch.randn(2, 4), variance="fast")
