"""`turbowan bench` refuses what it cannot time before any weights are made, and shows what it timed in two ways."""

import json
from pathlib import Path

import pytest
import torch

from turbowan.errors import RequestError

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h200"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--vary frames", "what varies must be one of tokens, top-k, got 'frames'"),
        ("--attention original --vary top-k", "top-k changes nothing with attention 'original'"),
        ("--attention flash", "attention must be one of auto, original, sla, sagesla, got 'flash'"),
        ("--resolution 4k", "resolution must be one of 480, 480p,"),
        ("--num-frames 80", "num_frames must be 4k+1, got 80"),
        ("--top-k 2", "sla_topk must be in (0, 1], got 2.0"),
        ("--precision int4", "precision must be one of bf16, int8, fp8, int8_block, got 'int4'"),
        ("--size 2B", "bench sizes are 1.3B, 14B, tiny and A14B-I2V; got '2B'"),
    ],
)
def test_refusals(arguments, line, command_line):
    code, out, err = command_line("bench", "transformer", *arguments.split())
    assert (code, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("pipeline --preset 2B", "preset must be one of 1.3B-480p, 14B-720p, A14B-I2V-720p,"),
        ("pipeline --preset tiny --format int4", "format must be one of bf16, int8_block, int8_row, fp8, got 'int4'"),
        ("pipeline --preset tiny --text-encoder int4", "format must be one of bf16, fp8, got 'int4'"),
        ("pipeline --preset tiny --num-frames 80", "num_frames must be 4k+1, got 80"),
        ("pipeline --preset tiny --cap 12QB", "a memory size looks like 12GB or 12GiB, got '12QB'"),
        ("pipeline --preset tiny --layers 0", "layers must be from 1 to 2, got 0"),
        ("text --format int4", "the text encoder's format must be one of bf16, fp8, got 'int4'"),
    ],
)
def test_other_refusals(arguments, line, command_line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command_line("bench", *arguments.split())
    assert (code, out) == (2, "")
    assert line in err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("arguments", ["", "--vary tokens --vary top-k --graph"])
def test_needs_a_gpu(arguments, command_line):
    code, out, err = command_line("bench", "transformer", *arguments.split())
    assert (code, out) == (2, "")
    assert err == "turbowan: bench transformer needs a CUDA device; there is none here\n"


@pytest.mark.parametrize("arguments", ["op norm --repeats 0", "transformer --repeats 0", "pipeline --requests -1"])
def test_too_few_repeats(arguments, command_line):
    code, out, err = command_line("bench", *arguments.split())
    assert (code, out) == (2, "")
    assert "Invalid value for '--re" in err


@pytest.fixture(params=["op norm", "transformer", "pipeline"])
def recorded(request, monkeypatch, tmp_path):
    """A bench that gives what it gave on a GPU once: its arguments and its records."""
    what, *argument = request.param.split()
    lines = (RECORDS / f"{request.param.replace(' ', '-')}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    name = "operation" if what == "op" else what
    monkeypatch.setattr(f"turbowan.bench.{what}.run_{name}", lambda *_: iter(records))
    if what == "pipeline":
        monkeypatch.setattr("turbowan.bench.presets.write_model", lambda *_: (None, tmp_path))
        argument = ["--device", "cpu"]
    return [what, *argument], records


def test_json_is_a_line_per_case(recorded, command_line):
    arguments, records = recorded
    code, out, _ = command_line("bench", *arguments, "--json")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == records


def test_a_table_shows_every_case(recorded, command_line):
    arguments, records = recorded
    code, out, _ = command_line("bench", *arguments)
    assert code == 0
    title, header, *rows = out.splitlines()
    assert title == f"{records[0]['bench']} on NVIDIA H200, PyTorch 2.11.0+cu130"
    assert header.split()[0] == "case"
    assert len(rows) == len(records)
    for row, record in zip(rows, records, strict=True):
        assert row.strip().startswith(record["case"])
        shown = row.strip().removeprefix(record["case"]).split()
        assert str(record["seconds"]["total"] if "seconds" in record else record["ms"]["p50"]) in shown
    assert len(max(out.splitlines(), key=len)) < 140


def test_what_was_timed_before_an_error_is_shown(monkeypatch, command_line):
    def timed(*_):
        yield {"bench": "op norm", "case": "a", "gpu": "G", "torch": "2", "ms": {"p50": 1.5}, "tflops": 0.0}
        yield {"bench": "op norm", "case": "b", "gpu": "G", "torch": "2", "failed": "no kernel"}
        raise RequestError("the GPU is gone")

    monkeypatch.setattr("turbowan.bench.op.run_operation", timed)
    code, out, err = command_line("bench", "op", "norm")
    assert (code, err) == (2, "turbowan: the GPU is gone\n")
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["case", "ms", "failed"], ["a", "1.5"], ["b", "no", "kernel"],
    ]  # fmt: skip
