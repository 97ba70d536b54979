"""int8 with a scale per row and per token."""

import pytest
import torch

from turbowan import ops
from turbowan.errors import MachineError

pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.mark.parametrize("shape", [(1, 1), (5, 130), (200, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_nearest_of_each_row(shape, dtype):
    x = torch.randn(shape).to(dtype)
    codes, scale = ops.quantize_int8_rowwise(x)
    amax = x.double().abs().amax(dim=1, keepdim=True)
    assert codes.dtype == torch.int8
    assert torch.allclose(scale.double(), amax / 127)
    assert (codes.double() - x.double() * 127 / amax).abs().max() <= 0.5 + 1e-4


def test_rows_of_zeros():
    codes, scale = ops.quantize_int8_rowwise(torch.zeros(2, 5))
    assert not codes.any()
    assert (scale > 0).all()


@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1, 1), (37, 100, 70), (3, 2500, 9)])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_is_the_product_of_the_codes(rows, k, n, dtype, bar, with_bias, relative_error):
    x, bias = torch.randn(rows, k, dtype=dtype), torch.randn(n)
    weight, weight_scale = ops.quantize_int8_rowwise(torch.randn(n, k))
    codes, scale = ops.quantize_int8_rowwise(x)
    expected = (codes.double() * scale.double()) @ (weight.double() * weight_scale.double()).T
    for shape in ((n,), (n, 1)):
        out = ops.linear_int8_rowwise(x, weight, weight_scale.view(shape), bias if with_bias else None)
        assert out.dtype == dtype
        assert relative_error(out, expected + bias.double() if with_bias else expected) <= bar


def test_long_rows_sum_exactly():
    """2,500 products of the largest codes: the sum passes float32's 24 bits, its parts must not."""
    x = torch.ones(1, 2500)
    x[0, 0] = -1
    weight = torch.full((2, 2500), 127, dtype=torch.int8)
    out = ops.linear_int8_rowwise(x, weight, torch.ones(2) / 127)
    assert out[0].tolist() == pytest.approx([2498.0] * 2, rel=2e-7)


def test_has_no_gradient_and_says_so():
    weight, scale = ops.quantize_int8_rowwise(torch.randn(8, 16))
    with pytest.raises(MachineError, match="product_int8_rowwise has no gradient"):
        ops.linear_int8_rowwise(torch.randn(2, 16, requires_grad=True), weight, scale)
