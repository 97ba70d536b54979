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
