"""The specification of GELU and rounding."""

import pytest
import torch

from turbowan import ops
from turbowan.errors import RequestError
from turbowan.ops.rows import FORMATS, quantize_rows

pytestmark = pytest.mark.usefixtures("fresh_seed")


def test_is_the_tanh_form_in_float64(relative_error):
    x = torch.randn(2, 3, 64) * 3
    wide = x.double()
    expected = wide / 2 * (1 + (0.7978845608028654 * (wide + 0.044715 * wide**3)).tanh())
    rows, scale = ops.gelu_rows(x)
    assert relative_error(rows, expected.flatten(0, 1)) <= 1e-6
    assert scale.numel() == 0


@pytest.mark.parametrize("format", FORMATS)
def test_formats_round_each_sample_for_itself(format):
    x = torch.randn(2, 130, 200, dtype=torch.bfloat16)
    values, scale = ops.gelu_rows(x, format)
    for i in range(2):
        one, steps = ops.gelu_rows(x[i], format)  # the rows of one sample
        assert torch.equal(values.unflatten(0, (2, -1))[i, :130].float(), one.float())
        if format != "bf16":
            assert torch.equal(scale.unflatten(0, (2, -1))[i], steps)
        plain = torch.nn.functional.gelu(x[i], approximate="tanh")
        assert torch.equal(one.float(), quantize_rows(plain, format)[0].float())


def test_refuses_an_unknown_format():
    with pytest.raises(RequestError, match="got 'int4'"):
        ops.gelu_rows(torch.randn(2, 4), "int4")
