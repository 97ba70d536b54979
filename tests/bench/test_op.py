"""What is recorded of a case, whatever happens to it."""

import pytest
import torch

from turbowan.bench import op
from turbowan.bench.case import Case
from turbowan.bench.op_linear import SHAPES
from turbowan.errors import RequestError


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The clock and the facts of one; everything else is real."""
    if not torch.cuda.is_available():
        for name in ("current_device", "reset_peak_memory_stats", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda: 0)
        monkeypatch.setattr(op, "machine_facts", lambda device: {"gpu": "G", "torch": "2", "commit": "c"})
        monkeypatch.setattr(op, "time_calls", lambda run, repeats: [1.0 for _ in range(repeats) if run() or True])


def fails(words):
    raise RuntimeError(words)


def test_rates_and_error(on_a_gpu):
    record = op.time_case(Case("a", lambda: None, {"rows": 4}, flops=10**9, error=lambda: 0.25), 3)
    assert {"p20", "p50", "p80"} == record["ms"].keys()
    assert record["tflops"] == pytest.approx(1 / record["ms"]["p50"], abs=0.06)
    assert record["error"] == 0.25
    assert "failed" not in record


def test_what_fails_does_not_end_the_others(on_a_gpu):
    record = op.time_case(Case("a", lambda: fails("no\nkernel")), 3)
    assert record["failed"] == "no kernel"
    assert "ms" not in record
    record = op.time_case(Case("a", lambda: None, error=lambda: fails("out of memory")), 3)
    assert record["failed"] == "its error: out of memory"
    assert "ms" in record


def test_every_operation_knows_every_shape(monkeypatch):
    assert set(op.SHAPES) == set(SHAPES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for what in op.OPERATIONS:
        for shape in op.SHAPES:
            module = op.operation_module(what, shape)
            assert callable(module.cases)
            assert callable(module.candidates)
    with pytest.raises(RequestError, match=r"attention, linear, norm, rope on .*; got 'vae'"):
        op.operation_module("vae", "14B-480p")
