"""What is timed computes what it says: every case once, at a size that fits here."""

import pytest
import torch

from turbowan.bench import op_linear

pytestmark = pytest.mark.usefixtures("fresh_seed")

BARS = {"bf16": 0.005, "int8_row": 0.015, "int8_block": 0.015, "fp8_row": 0.04}


def test_cases_stay_within_the_error_bars(monkeypatch):
    monkeypatch.setitem(op_linear.SHAPES, "small", (160, 256, 384))
    names = []
    for case in op_linear.cases("small", "cuda" if torch.cuda.is_available() else "cpu"):
        names.append(case.name)
        if case.error is None:
            case.run()
        else:
            assert case.error() <= BARS[case.name.split()[0].rstrip(",")]
        assert case.bytes > 0
    assert len(names) == len(set(names))
    assert {"bf16 256x768", "int8_row 256x256", "fp8_row 256x384", "int8_block 384x256", "int_mm 256x256"} <= set(names)
    assert {"quantize int8_row 256", "quantize fp8_row 384", "quantize int8_block 256"} <= set(names)
