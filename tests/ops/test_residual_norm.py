"""The specification of gate, residual, LayerNorm, modulation and rounding."""

import pytest
import torch
import torch.nn.functional as F

from turbowan import ops
from turbowan.errors import RequestError
from turbowan.ops.rows import FORMATS

pytestmark = pytest.mark.usefixtures("fresh_seed")


def modulation(batch, width):
    """Shift, scale and gate [B, 1, D] as a block has them: views of one tensor."""
    return torch.randn(batch, 6, width).unsqueeze(2).unbind(1)[:3]


def test_is_what_it_says_in_float64(relative_error):
    x, delta = torch.randn(2, 2, 7, 96).unbind(0)
    weight, bias = torch.randn(2, 96).unbind(0)
    shift, scale, gate = modulation(2, 96)
    x_new, rows, row_scale = ops.residual_norm(x, delta, gate, weight, bias, shift, scale)
    total = x.double() + delta.double() * gate.double()
    normed = F.layer_norm(total, (96,), weight.double(), bias.double(), eps=1e-6)
    assert relative_error(x_new, total) <= 1e-6
    assert relative_error(rows, (normed * (1 + scale.double()) + shift.double()).flatten(0, 1)) <= 1e-6
    assert row_scale.numel() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variance", ["exact", "official"])
def test_rounds_after_every_step(dtype, variance):
    x, delta = torch.randn(2, 2, 7, 96, dtype=dtype).unbind(0)
    shift, scale, gate = modulation(2, 96)
    x_new, rows, _ = ops.residual_norm(x, delta, gate, None, None, shift, scale, variance=variance)
    product = (delta.double() * gate.to(dtype).double()).to(dtype)
    total = (x.double() + product.double()).to(dtype)
    assert torch.equal(x_new, total)
    normed = ops.layer_norm(total, variance=variance)
    assert torch.equal(rows, (normed.float() * (1 + scale) + shift).to(dtype).flatten(0, 1))
    assert torch.equal(ops.residual_norm(x, delta)[0], x + delta)


def test_without_a_change_x_is_returned_itself():
    x = torch.randn(2, 3, 64)
    x_new, rows, _ = ops.residual_norm(x)
    assert x_new is x
    assert torch.equal(rows, ops.layer_norm(x).flatten(0, 1))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batch", [1, 2])
def test_formats_round_each_sample_for_itself(format, batch):
    x = torch.randn(batch, 150, 140) * torch.rand(batch, 1, 140)
    _, values, scale = ops.residual_norm(x, shift=torch.full((batch, 1, 140), 5.0), scale=torch.zeros(batch, 1, 140),
                                         format=format)  # fmt: skip
    per_sample = values.unflatten(0, (batch, -1))
    for i in range(batch):
        plain = (ops.layer_norm(x[i]) + 5.0).contiguous()
        if format == "bf16":
            assert torch.equal(per_sample[i], plain)
            continue
        quantise = {"int8_row": ops.quantize_int8_rowwise, "fp8_row": ops.quantize_fp8_rowwise,
                    "int8_block": ops.quantize_int8_blockwise}[format]  # fmt: skip
        codes, steps = quantise(plain)
        assert torch.equal(per_sample[i, :150].float(), codes.float())
        assert torch.equal(scale.unflatten(0, (batch, -1))[i], steps)
        assert not per_sample[i, 150:].float().any()
    padded = format == "int8_block" and batch > 1
    assert values.shape == (batch * (256 if padded else 150), 140)


def test_refuses_what_makes_no_sense():
    x = torch.randn(1, 3, 64)
    row = torch.zeros(1, 1, 64)
    with pytest.raises(RequestError, match="norms must be one of exact, official, got 'fast'"):
        ops.residual_norm(x, variance="fast")
    with pytest.raises(RequestError, match="input is one of bf16, int8_row, fp8_row, int8_block, got 'int4'"):
        ops.residual_norm(x, format="int4")
    with pytest.raises(RequestError, match="shift and scale together"):
        ops.residual_norm(x, shift=row)
    with pytest.raises(RequestError, match="a gate only with a delta"):
        ops.residual_norm(x, gate=row)
