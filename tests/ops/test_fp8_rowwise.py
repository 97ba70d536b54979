"""float8 with a scale per row and per token."""

import pytest
import torch

from turbowan import ops
from turbowan.errors import MachineError, RequestError
from turbowan.ops import fp8_rowwise

pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.mark.parametrize("shape", [(1, 1), (5, 130), (200, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_nearest_of_each_row(shape, dtype):
    x = torch.randn(shape).to(dtype)
    codes, scale = ops.quantize_fp8_rowwise(x)
    amax = x.double().abs().amax(dim=1, keepdim=True)
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.allclose(scale.double(), amax / 448)
    assert codes.float().abs().amax(dim=1).eq(448).all()
    exact = x.double() * 448 / amax
    step = 2.0 ** (exact.abs().clamp(min=2**-6).log2().floor() - 3)  # between neighbours: 3 bits, 2^-9 at least
    assert ((codes.double() - exact).abs() <= step * (0.5 + 1e-4)).all()


def test_rows_of_zeros():
    codes, scale = ops.quantize_fp8_rowwise(torch.zeros(2, 5))
    assert not codes.float().any()
    assert (scale > 0).all()


@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1, 1), (37, 100, 70), (3, 2500, 9)])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_is_the_product_of_the_codes(rows, k, n, dtype, bar, with_bias, relative_error):
    x, bias = torch.randn(rows, k, dtype=dtype), torch.randn(n)
    weight, weight_scale = ops.quantize_fp8_rowwise(torch.randn(n, k))
    codes, scale = ops.quantize_fp8_rowwise(x)
    expected = (codes.double() * scale.double()) @ (weight.double() * weight_scale.double()).T
    for shape in ((n,), (n, 1)):
        out = ops.linear_fp8_rowwise(x, weight, weight_scale.view(shape), bias if with_bias else None)
        assert out.dtype == dtype
        assert relative_error(out, expected + bias.double() if with_bias else expected) <= bar


def test_linear_is_near_the_full_precision_one(relative_error):
    x, weight = torch.randn(300, 640), torch.randn(256, 640)
    assert 0.02 < relative_error(ops.linear_fp8_rowwise(x, *ops.quantize_fp8_rowwise(weight)), x @ weight.T) < 0.04


def product_arguments(m, n, k, device="cpu"):
    weight, weight_scale = ops.quantize_fp8_rowwise(torch.randn(n, k))
    parts = (*ops.quantize_fp8_rowwise(torch.randn(m, k)), weight, weight_scale.flatten(), torch.randn(n))
    return tuple(part.to(device) for part in parts)


def scaled_mm_runs() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 9)
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)  # on the CPU too


@pytest.mark.skipif(not scaled_mm_runs(), reason="torch._scaled_mm with row scales runs from 8.9, or on CPUs from 2.13")
@pytest.mark.parametrize("sizes", [(1, 16, 16), (37, 64, 96), (40, 33, 130), (2, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
def test_pytorch_s_product_equals_the_eager_twin(sizes, dtype, activation, relative_error):
    """Widths that are no multiples of 16 are padded and cut off again."""
    args = (*product_arguments(*sizes, "cuda" if torch.cuda.is_available() else "cpu"), dtype, activation)
    for fast in (True, False):
        out = fp8_rowwise._scaled_mm(*args, fast=fast)
        assert out.dtype == dtype
        assert out.is_contiguous()
        few = sizes[0] * sizes[1] < 100  # a last bit of bfloat16 is then much of the whole
        assert relative_error(out, fp8_rowwise._product(*args)) <= (2e-2 if few else 6e-3)


def test_has_no_gradient_and_says_so():
    weight, scale = ops.quantize_fp8_rowwise(torch.randn(8, 16))
    with pytest.raises(MachineError, match="fp8_rowwise has no gradient"):
        ops.linear_fp8_rowwise(torch.randn(2, 16, requires_grad=True), weight, scale)


@pytest.mark.parametrize("format", ["fp8_rowwise", "int8_rowwise", "int8_blockwise"])
def test_an_unknown_activation_is_refused(format):
    parts = getattr(ops, f"quantize_{format}")(torch.randn(4, 16))
    with pytest.raises(RequestError, match="none, gelu_tanh; got 'relu'"):
        getattr(ops, f"product_{format}")(*parts, *parts, None, torch.float32, "relu")


@pytest.mark.parametrize("format", ["fp8_rowwise", "int8_rowwise", "int8_blockwise"])
def test_the_activation_works_on_what_was_rounded(format):
    weight, scale = getattr(ops, f"quantize_{format}")(torch.randn(24, 40))
    parts = (*getattr(ops, f"quantize_{format}")(torch.randn(12, 40)), weight, scale, torch.randn(24), torch.bfloat16)
    product = getattr(ops, f"product_{format}")
    plain = product(*parts)
    assert torch.equal(product(*parts, "gelu_tanh"), torch.nn.functional.gelu(plain, approximate="tanh"))
