"""The VAE's convolution: every implementation against PyTorch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from turbowan import ops
from turbowan.ops import OPERATIONS, Facts

pytestmark = pytest.mark.usefixtures("fresh_seed")

CASES = [
    ((2, 3, 5, 12, 14), (8, 3, 3, 3, 3), (1, 1, 1), (0, 1, 1)),
    ((1, 16, 9, 6, 6), (16, 16, 3, 1, 1), (2, 1, 1), (0, 0, 0)),
    ((1, 4, 1, 5, 7), (6, 4, 1, 1, 1), (1, 1, 1), (0, 0, 0)),
    ((1, 16, 4, 66, 66), (16, 16, 3, 3, 3), (1, 1, 1), (0, 1, 1)),
]
RUNNABLE = [
    i.name
    for i in OPERATIONS["conv3d"].implementations
    if i.constraints.refusal(Facts("cpu", torch.float32)) is None
]


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize(("x", "weight", "stride", "padding"), CASES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_is_pytorchs(implementation, x, weight, stride, padding, layout, relative_error):
    x, weight, bias = torch.randn(x).contiguous(memory_format=layout), torch.randn(weight), torch.randn(weight[0])
    with ops.force(conv3d=implementation):
        ours = ops.conv3d(x, weight, bias, stride, padding)
        unbiased = ops.conv3d(x, weight, None, stride, padding)
    expected = F.conv3d(x.double(), weight.double(), None, stride, padding)
    assert relative_error(ours, expected + bias.double().view(-1, 1, 1, 1)) <= 1e-6
    assert relative_error(unbiased, expected) <= 1e-6
    assert ours.is_contiguous(memory_format=torch.channels_last_3d if torch.backends.mkldnn.is_available() else layout)


def test_a_part_of_a_larger_tensor():
    x, weight = torch.randn(1, 4, 9, 8, 8), torch.randn(4, 4, 3, 3, 3)
    part = x[:, :, 2:7]
    assert torch.allclose(ops.conv3d(part, weight, None), ops.conv3d(part.contiguous(), weight, None), atol=1e-5)


def test_bfloat16(relative_error):
    x, weight = torch.randn(1, 8, 4, 9, 9).bfloat16(), torch.randn(8, 8, 3, 3, 3)
    ours = ops.conv3d(x, weight.bfloat16(), None, padding=(0, 1, 1))
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, F.conv3d(x.double(), weight.double(), None, 1, (0, 1, 1))) <= 1e-2


def test_keeps_the_inputs_dtype_under_autocast():
    """As its fake implementation says; float32 weights follow a bfloat16 input."""
    x, weight, bias = torch.randn(1, 4, 3, 8, 8), torch.randn(4, 4, 3, 3, 3), torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.conv3d(x, weight, bias).dtype == torch.float32
        assert ops.conv3d(x.bfloat16(), weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize(("x", "weight", "stride", "padding"), CASES)
def test_multiply_adds_are_counted(x, weight, stride, padding):
    x, weight = torch.randn(x), torch.randn(weight)
    with FlopCounterMode(display=False) as ours:
        ops.conv3d(x, weight, None, stride, padding)
    with FlopCounterMode(display=False) as pytorch:
        F.conv3d(x, weight, None, stride, padding)
    assert ours.get_total_flops() == pytorch.get_total_flops() > 0
