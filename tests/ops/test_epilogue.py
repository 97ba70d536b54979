"""What products of rounded rows refuse, whatever their format."""

import pytest
import torch

from turbowan import ops
from turbowan.errors import RequestError

pytestmark = pytest.mark.usefixtures("fresh_seed")

NAMES = ("codes", "scale", "weight", "weight_scale", "bias")
CHANGES = {
    "codes": "a product takes rows",
    "weight": "a product takes rows",
    "scale": "scales of rows and weight must be",
    "weight_scale": "scales of rows and weight must be",
    "bias": r"the bias must be \[140\]",
}


@pytest.mark.parametrize("format", ["int8_rowwise", "int8_blockwise", "fp8_rowwise"])
@pytest.mark.parametrize("name", list(CHANGES))
def test_shapes_that_do_not_go_together(format, name):
    """A kernel would read past what is too short."""
    quantize, product = getattr(ops, f"quantize_{format}"), getattr(ops, f"product_{format}")
    whole = (*quantize(torch.randn(300, 290)), *quantize(torch.randn(140, 290)), torch.randn(140))
    given = dict(zip(NAMES, whole, strict=True))
    assert product(**given, dtype=torch.float32).shape == (300, 140)
    for axis in range(given[name].ndim):
        if given[name].shape[axis] == 1:
            continue
        short = given | {name: given[name].narrow(axis, 1, given[name].shape[axis] - 1)}
        if name in ("codes", "weight") and axis == 0:  # rows of their own: then the scales do not fit
            short[name] = given[name][:100]
            with pytest.raises(RequestError, match="scales of rows and weight must be"):
                product(**short, dtype=torch.float32)
        else:
            with pytest.raises(RequestError, match=CHANGES[name]):
                product(**short, dtype=torch.float32)


@pytest.mark.parametrize("format", ["int8_rowwise", "int8_blockwise", "fp8_rowwise"])
def test_numbers_and_weights_of_other_widths(format):
    weight = getattr(ops, f"quantize_{format}")(torch.randn(140, 290))
    with pytest.raises(RequestError, match=r"got \[5, 160\] and \[140, 290\]"):
        getattr(ops, f"linear_{format}")(torch.randn(5, 160), *weight)
