"""`turbowan bench transformer` refuses what it cannot time in one line, before any weights are made."""

import pytest
import torch


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
