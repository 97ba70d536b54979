"""The cases of attention: each runs, is as near as its precision allows, and counts its work."""

import pytest
import torch

from turbowan.bench import op_attention
from turbowan.bench.op_linear import SHAPES

pytestmark = pytest.mark.usefixtures("fresh_seed")


def test_every_case(kernels, monkeypatch):
    monkeypatch.setitem(SHAPES, "small", (700, 128, 256))
    names = set()
    for case in op_attention.cases("small", kernels.type):
        names.add(case.name)
        out = case.run()
        assert all(torch.isfinite(x.float()).all() for x in (out if isinstance(out, tuple) else (out,)))
        assert case.bytes > 0
        if "dense" in case.name:
            assert case.flops == 4 * 700 * 700 * 128
        if "sparse" in case.name:
            assert case.flops >= 4 * 700 * 64 * 128  # one key block of 11
        if case.error:
            assert case.error() <= 5e-3, case.name
    assert len(names) == 15


def test_a_sweep_runs_every_candidate(kernels, monkeypatch):
    def once(case, repeats):
        case.run()
        return {"ms": {"p50": repeats}, "peak_gib": 0.0}

    monkeypatch.setitem(SHAPES, "small", (70, 128, 256))
    monkeypatch.setattr(op_attention, "time_case", once)
    records = [list(op_attention.sweep("small", (i, 2), 7, kernels.type)) for i in range(2)]
    assert sum(map(len, records)) > 40
    assert all(record["ms"] == {"p50": 7} and "peak_gib" not in record for part in records for record in part)
