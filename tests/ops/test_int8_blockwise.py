"""The official int8 format: recorded codes and products, and the rules on fresh input of any shape."""

import pytest
import torch

from turbowan import ops
from turbowan.errors import MachineError

pytestmark = pytest.mark.usefixtures("fresh_seed")

SHAPES = [(1, 1), (128, 128), (129, 127), (300, 384), (5, 520)]


def blocks(rows, columns):
    for r in range(0, rows, 128):
        for c in range(0, columns, 128):
            yield (r // 128, c // 128), (slice(r, r + 128), slice(c, c + 128))


@pytest.mark.parametrize("name", ["w", "x"])
def test_recorded_codes(name, recorded):
    x, expected, expected_scale = recorded("ops.safetensors", name, f"{name}_int8", f"{name}_scale")
    codes, scale = ops.quantize_int8_blockwise(x)
    assert torch.equal(scale, expected_scale)
    off = (codes.int() - expected.int()).abs()
    assert off.max() <= 1
    assert (off == 0).double().mean() >= 0.999


def test_recorded_linear(recorded, relative_error):
    x, weight, scale, y = recorded("ops.safetensors", "x", "w_int8", "w_scale", "y")
    assert relative_error(ops.linear_int8_blockwise(x, weight, scale), y) <= 0.005


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_the_nearest_of_each_block(shape, dtype):
    x = torch.randn(shape).mul(torch.rand(shape[0], 1)).to(dtype)
    codes, scale = ops.quantize_int8_blockwise(x)
    assert codes.dtype == torch.int8
    assert codes.shape == x.shape
    assert codes.is_contiguous()
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for index, part in blocks(*shape):
        amax = x[part].float().abs().max()
        assert scale[index] == amax / 128
        exact = (x[part].double() * 128 / amax.double()).clamp(-128, 127)
        assert (codes[part].double() - exact).abs().max() <= 0.5 + 1e-4


def test_the_largest_value_saturates_and_its_negative_does_not():
    x = torch.zeros(128, 256)
    x[3, 7], x[5, 200] = 0.75, -0.75
    codes, scale = ops.quantize_int8_blockwise(x)
    assert (codes[3, 7], codes[5, 200]) == (127, -128)
    assert torch.equal(scale, torch.full((1, 2), 0.75 / 128))


def test_halves_are_rounded_to_even():
    x = torch.tensor([[128.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert ops.quantize_int8_blockwise(x)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


def test_blocks_of_zeros():
    codes, scale = ops.quantize_int8_blockwise(torch.zeros(200, 130))
    assert not codes.any()
    assert ((scale > 0) & (scale <= 1e-8 / 128)).all()
    out = ops.linear_int8_blockwise(torch.zeros(3, 130), codes, scale, torch.ones(200))
    assert torch.equal(out, torch.ones(3, 200))


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_is_within_half_a_step(shape):
    x = torch.randn(shape)
    codes, scale = ops.quantize_int8_blockwise(x)
    back = ops.dequantize_int8_blockwise(codes, scale)
    step = torch.ones(shape)
    for index, part in blocks(*shape):
        step[part] = scale[index]
    below = codes < 127  # the largest value saturates, half a step further away
    assert ((back - x).abs() <= 0.501 * step)[below].all()
    assert ((back - x).abs() <= 1.001 * step).all()


@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1, 1), (37, 100, 70), (130, 128, 256), (257, 300, 129), (4, 1100, 8)])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_linear_is_the_product_of_the_codes(rows, k, n, dtype, bar, relative_error):
    """Any K: against the float64 product of the dequantised sides."""
    x, bias = torch.randn(rows, k, dtype=dtype), torch.randn(n)
    weight, weight_scale = ops.quantize_int8_blockwise(torch.randn(n, k))
    codes, scale = ops.quantize_int8_blockwise(x)
    left, right = (
        ops.dequantize_int8_blockwise(*pair, dtype=torch.float64) for pair in ((codes, scale), (weight, weight_scale))
    )
    out = ops.linear_int8_blockwise(x, weight, weight_scale, bias)
    assert out.dtype == dtype
    assert relative_error(out, left @ right.T + bias.double()) <= bar


def test_the_product_is_rounded_once_after_the_bias():
    """257 - 256 is 1; bfloat16 has no 257, so rounding before the bias would give 0."""
    x = torch.tensor([[128.0]], dtype=torch.bfloat16)  # code 127, scale 1
    weight, scale = torch.tensor([[1]], dtype=torch.int8), torch.tensor([[257 / 127]])
    out = ops.linear_int8_blockwise(x, weight, scale, torch.tensor([-256.0]))
    assert out.dtype == torch.bfloat16
    assert out.item() == 1


def test_linear_is_near_the_full_precision_one(relative_error):
    x, weight = torch.randn(300, 640), torch.randn(256, 640)
    out = ops.linear_int8_blockwise(x, *ops.quantize_int8_blockwise(weight))
    assert 0.002 < relative_error(out, x @ weight.T) < 0.03


def test_autocast_does_not_touch_the_integer_product(relative_error):
    x = torch.randn(140, 300)
    weight = ops.quantize_int8_blockwise(torch.randn(64, 300))
    expected = ops.linear_int8_blockwise(x, *weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.linear_int8_blockwise(x, *weight), expected)


def test_has_no_gradient_and_says_so():
    weight = ops.quantize_int8_blockwise(torch.randn(8, 16))
    with pytest.raises(MachineError, match="product_int8_blockwise has no gradient"):
        ops.linear_int8_blockwise(torch.randn(2, 16, requires_grad=True), *weight)
