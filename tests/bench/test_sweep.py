"""A sweep times every configuration once, goes on where one fails and ends where one hangs."""

import json
import sys
from importlib import import_module
from time import sleep

import pytest
import torch

from turbowan.bench import sweep as bench_sweep
from turbowan.bench.case import Case, relative_error
from turbowan.bench.op import OPERATIONS
from turbowan.bench.op_linear import SHAPES
from turbowan.bench.sweep import sweep

pytestmark = pytest.mark.usefixtures("fresh_seed")

SMALL = {"attention": (70, 128, 256), "linear": (160, 256, 384), "norm": (2, 256, 300), "rope": (2, 256, 300)}


def run_once(case, repeats):
    """Without a GPU there are no times; attention's errors there would be those of the interpreter's bfloat16."""
    try:
        case.run()
        checked = case.error and (torch.cuda.is_available() or "tokens" not in case.shape)
        return {"ms": {"p50": repeats}, "error": case.error() if checked else 0.0}
    except Exception as error:
        return {"failed": str(error)}


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's, in the interpreter
@pytest.mark.parametrize("what", OPERATIONS)
def test_every_candidate_once(what, monkeypatch, kernels):
    monkeypatch.setitem(SHAPES, "small", SMALL[what])
    monkeypatch.setattr(bench_sweep, "time_case", run_once)
    candidates = import_module(f"turbowan.bench.op_{what}").candidates
    first, second = (list(sweep(candidates("small", kernels.type), (i, 2), 7)) for i in range(2))
    tried = [json.dumps([record["kernel"], record["config"]]) for record in first + second]
    assert len(tried) > 12
    assert len(first) - len(second) in (0, 1)
    assert what == "attention" or len(set(tried)) == len(tried)  # there one configuration may serve two block sizes
    for record in first + second:
        if record["config"].get("kind") == "HopperConfig" and not torch.cuda.is_available():
            assert "failed" in record
        else:
            assert record["ms"] == {"p50": 7}
            assert record["error"] <= (0.015 if what == "linear" else 0.04)


def test_what_hangs_ends_the_sweep_with_its_name(monkeypatch, capsys):
    ends = []
    monkeypatch.setattr(bench_sweep, "PATIENCE", 0.05)
    monkeypatch.setattr(bench_sweep.os, "_exit", ends.append)
    monkeypatch.setattr(bench_sweep, "time_case", lambda case, repeats: sleep(0.5) or {})
    list(sweep([(Case("stuck", lambda: None), {"warps": 4})]))
    assert ends == [3]
    line = json.loads(capsys.readouterr().out)
    assert (line["kernel"], line["config"]) == ("stuck", {"warps": 4})
    assert "no result after 0.05 s" in line["failed"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("norm 14B-480p 2/2", "0 <= i < n"),
        ("norm 14B-480p half", "got 'half'"),
        ("vae 14B-480p", "invalid choice: 'vae'"),
        pytest.param("norm 14B-480p 0/2", "needs a CUDA device", marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="there is a CUDA device")),
    ],
)  # fmt: skip
def test_what_cannot_be_swept(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        bench_sweep.main()
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_the_error_is_relative():
    x = torch.randn(100, dtype=torch.float64)
    assert relative_error(x * 1.25, x) == 0.25
    assert relative_error(x.bfloat16(), x.bfloat16()) == 0
