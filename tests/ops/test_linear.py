"""Linear layers in 16 and 32 bits; on Hopper by the kernel."""

import pytest
import torch
import torch.nn.functional as F

from turbowan import ops
from turbowan.errors import RequestError

pytestmark = pytest.mark.usefixtures("fresh_seed")
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def test_is_pytorchs(relative_error):
    x, weight, bias = torch.randn(2, 7, 24), torch.randn(9, 24), torch.randn(9)
    assert torch.equal(ops.linear(x, weight, bias), F.linear(x.flatten(0, 1), weight, bias).view(2, 7, 9))
    ours = ops.linear(x, weight, None, "gelu_tanh")
    assert relative_error(ours, F.gelu(F.linear(x, weight), approximate="tanh")) <= 1e-6
    with pytest.raises(RequestError, match="activations of a product are none, gelu_tanh; got 'silu'"):
        ops.linear(x, weight, None, "silu")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize(("m", "k", "n"), [(4097, 136, 264), (5000, 5120, 1536), (32760, 1536, 8960), (8192, 64, 8)])
def test_on_hopper(guarded, relative_error, dtype, activation, m, k, n):
    """Against float64 of what was rounded; 20 runs bit for bit; nothing beside the result is written."""
    from turbowan.ops.triton.linear import linear

    x, weight, bias = (torch.randn(*shape, device="cuda").to(dtype) for shape in ((m, k), (n, k), (n,)))
    weight = weight / k**0.5
    for given in (bias, None):
        ours = guarded(linear, x, weight, given, activation)
        expected = F.linear(x.float(), weight.float(), None if given is None else given.float())
        expected = F.gelu(expected, approximate="tanh") if activation == "gelu_tanh" else expected
        assert ours.dtype == dtype
        assert relative_error(ours, expected) <= 0.004
        for _ in range(20):
            assert torch.equal(linear(x, weight, given, activation), ours)
