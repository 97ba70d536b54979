"""Linear layers whose weights are float8 with a scale."""

import pytest
import torch

from turbowan import ops

pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("scales", [1, 9])
@pytest.mark.parametrize("lead", [(), (4,), (2, 7)])
def test_is_the_linear_of_the_expanded_weight(kind, dtype, bar, scales, lead, relative_error):
    x, bias = torch.randn(*lead, 33, dtype=dtype), torch.randn(9)
    weight, scale = (torch.randn(9, 33) * 10).to(kind), torch.rand(scales) + 0.1
    out = ops.linear_fp8_scaled(x, weight, scale, bias)
    assert out.dtype == dtype
    expected = x.double() @ (weight.double() * scale.double()[:, None]).T
    assert relative_error(out, expected + bias.double()) <= bar
    assert relative_error(ops.linear_fp8_scaled(x, weight, scale), expected) <= bar
