"""The recordings here are true copies of the whole set's, where that lies beside the checkout."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
CORNERS = {"w": (384, 256), "x": (256, 0)}  # of these, the rows and columns from here on were kept: whole blocks


@pytest.mark.parametrize("name", ["t2v-tiny.io.safetensors", "ops.safetensors"])
def test_tensors_are_the_recorded_ones(name, golden):
    whole = golden(name)
    if whole.parent == HERE:
        pytest.skip("the whole set is not here")
    copy, whole = load_file(HERE / name), load_file(whole)
    for key, value in copy.items():
        expected = whole[key]
        stem, _, kind = key.partition("_")
        if stem in CORNERS and name == "ops.safetensors":
            row, column = (start // 128 if kind == "scale" else start for start in CORNERS[stem])
            expected = expected[row:, column:]
        assert torch.equal(value.to(expected.dtype), expected), key


def test_checkpoint_is_the_recorded_one(golden):
    name = "t2v-tiny-quant.pth"
    if golden(name).parent == HERE:
        pytest.skip("the whole set is not here")
    assert golden(name).read_bytes() == (HERE / name).read_bytes()
