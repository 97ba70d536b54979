"""The cases of the elementwise operations: each runs, is as near as its format allows, and counts its bytes."""

import pytest

from turbowan.bench import op_norm, op_rope
from turbowan.bench.op_linear import SHAPES

pytestmark = pytest.mark.usefixtures("fresh_seed")

# rows that are products of Gaussian numbers have longer tails than those, and coarser steps
BARS = {"bf16": 5e-3, "int8_row": 2.5e-2, "fp8_row": 4e-2, "int8_block": 3e-2}


@pytest.mark.parametrize("bench", [op_norm, op_rope])
def test_every_case(bench, monkeypatch):
    monkeypatch.setitem(SHAPES, "small", (520, 256, 300))
    names = set()
    for case in bench.cases("small", "cpu"):
        names.add(case.name)
        out = case.run()
        written = sum(x.numel() * x.element_size() for x in (out if isinstance(out, tuple) else (out,)))
        if "first" in case.name:
            written -= 2 * 520 * 256  # x itself
        assert written < case.bytes < 4.2 * written
        if case.error:
            bar = next((bar for format, bar in BARS.items() if format in case.name), BARS["bf16"])
            assert 0 < case.error() <= bar, case.name
    assert len(names) == (18 if bench is op_norm else 5)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's, in the interpreter
@pytest.mark.parametrize("bench", [op_norm, op_rope])
def test_a_sweep_runs_every_candidate(bench, monkeypatch, kernels):
    def once(case, repeats):
        case.run()
        return {"ms": {"p50": repeats}, "peak_gib": 0.0}

    monkeypatch.setitem(SHAPES, "small", (2, 256, 300))
    monkeypatch.setattr(op_norm, "time_case", once)
    records = [list(bench.sweep("small", (i, 2), 7, kernels.type)) for i in range(2)]
    configs = [str(record["config"]) + record["kernel"] for part in records for record in part]
    assert len(set(configs)) == len(configs) > 12
    assert all(record["ms"] == {"p50": 7} and "peak_gib" not in record for part in records for record in part)
