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
