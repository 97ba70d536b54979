"""What is timed computes what it says: every case once, at a size that fits here."""

import pytest
import torch

from turbowan.bench import op_linear

pytestmark = pytest.mark.usefixtures("fresh_seed")

BARS = {"bf16": 0.005, "int8_row": 0.015, "int8_block": 0.015, "fp8_row": 0.04}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(op_linear.SHAPES, "small", (160, 256, 384))


def test_cases_stay_within_the_error_bars():
    names = []
    for case in op_linear.cases("small"):
        names.append(case.name)
        if case.error is None:
            case.run()
        else:
            assert case.error() <= BARS[case.name.split()[0].rstrip(",")]
        assert case.bytes > 0
    assert len(names) == len(set(names))
    assert {"bf16 256x768", "int8_row 256x256", "fp8_row 256x384", "int8_block 384x256", "int_mm 256x256"} <= set(names)
    assert {"quantize int8_row 256", "quantize fp8_row 384", "quantize int8_block 256"} <= set(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sweep itself is for GPUs")
def test_a_sweep_tries_every_candidate_once(monkeypatch):
    """Without a GPU there are no times; kernels that need one are reported as failed, the others are right."""
    pytest.importorskip("triton")

    def run_once(case, repeats):
        try:
            case.run()
            return {"error": case.error() if case.error else 0.0}
        except Exception as error:
            return {"failed": str(error)}

    monkeypatch.setattr(op_linear, "time_case", run_once)
    records = [record for part in ((0, 2), (1, 2)) for record in op_linear.sweep("small", part)]
    tried = [(record["kernel"], str(record["config"])) for record in records]
    assert len(tried) == len(set(tried))
    for record in records:
        if record["config"].get("kind") == "HopperConfig":
            assert "failed" in record
        else:
            assert record["error"] <= 0.015
