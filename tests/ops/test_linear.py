"""Linear layers in 16 and 32 bits."""

import pytest
import torch
import torch.nn.functional as F

from turbowan import ops
from turbowan.errors import RequestError

pytestmark = pytest.mark.usefixtures("fresh_seed")


def test_is_pytorchs(relative_error):
    x, weight, bias = torch.randn(2, 7, 24), torch.randn(9, 24), torch.randn(9)
    assert torch.equal(ops.linear(x, weight, bias), F.linear(x.flatten(0, 1), weight, bias).view(2, 7, 9))
    ours = ops.linear(x, weight, None, "gelu_tanh")
    assert relative_error(ours, F.gelu(F.linear(x, weight), approximate="tanh")) <= 1e-6
    with pytest.raises(RequestError, match="activations of a product are none, gelu_tanh; got 'silu'"):
        ops.linear(x, weight, None, "silu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "k", "n"), [(7, 136, 264), (5000, 5120, 1536), (32760, 1536, 8960)])
def test_gelu_in_the_epilogue(relative_error, dtype, m, k, n):
    """It is GELU's tanh form, of which erf's differs by 2e-4 here; so close to float32 because it is rounded once."""
    x, weight, bias = (torch.randn(*shape, device="cuda").to(dtype) for shape in ((m, k), (n, k), (n,)))
    weight = weight / k**0.5
    ours = ops.linear(x, weight, bias, "gelu_tanh")
    expected = F.gelu(F.linear(x.float(), weight.float(), bias.float()), approximate="tanh")
    assert ours.dtype == dtype
    assert relative_error(ours, expected) <= (0.003 if dtype == torch.bfloat16 else 4e-4)
    assert torch.equal(ops.linear(x, weight, bias, "gelu_tanh"), ours)
