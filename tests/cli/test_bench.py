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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("arguments", ["", "--vary tokens --vary top-k --graph"])
def test_needs_a_gpu(arguments, command_line):
    code, out, err = command_line("bench", "transformer", *arguments.split())
    assert (code, out) == (2, "")
    assert err == "turbowan: bench transformer needs a CUDA device; there is none here\n"
