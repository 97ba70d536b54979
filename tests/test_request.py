"""Requests validate themselves: one line that names the value, its limits and what was given."""

from __future__ import annotations

import pytest

from turbowan.errors import RequestError, TurbowanError
from turbowan.request import GenerateRequest, parse_bytes


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n\t"}, "the prompt is empty"),
        ({"prompt": "x" * 10_000}, "prompt has 10,000 characters; at most 5,000"),
        ({"prompt": 7}, "prompt must be text, got int"),
        ({"negative_prompt": "x" * 5_001}, "negative_prompt has 5,001 characters"),
        ({"num_frames": 80}, r"num_frames must be 4k\+1, got 80 \(nearest: 77 or 81\)"),
        ({"num_frames": 0}, r"num_frames must be 4k\+1, got 0 \(nearest: 1 or 5\)"),
        ({"num_frames": -3}, r"num_frames must be 4k\+1, got -3"),
        ({"width": 17, "height": 31}, r"width must be a multiple of 16 .* got 17 \(nearest: 16\)"),
        ({"width": 16, "height": 31}, r"height must be a multiple of 16 .* got 31 \(nearest: 32\)"),
        ({"width": 8192, "height": 32}, "from 16 to 4096 pixels, got 8192"),
        ({"width": 64}, "only width is given"),
        ({"width": 64, "height": 64, "resolution": "480p"}, "either a resolution or width and height"),
        ({"resolution": "481p"}, "resolution must be one of .*480p.*1080p.*, got '481p'"),
        ({"aspect_ratio": "2:1"}, "aspect_ratio must be one of"),
        ({"sampler": "ddim"}, "sampler must be one of rcm, euler, unipc, got 'ddim'"),
        ({"num_steps": 0}, "num_steps must be from 1 to 1000, got 0"),
        ({"num_samples": 0}, "num_samples must be from 1 to 64, got 0"),
        ({"seed": -1}, "seed must be from 0"),
        ({"sla_topk": 0.0}, r"sla_topk must be in \(0, 1\], got 0.0"),
        ({"sla_topk": 1.5}, "got 1.5"),
        ({"sigma_max": 0.0}, "sigma_max must be positive, got 0.0"),
        ({"boundary": 1.5}, "boundary must be from 0 to 1, got 1.5"),
        ({"num_steps": 2.5}, "num_steps must be a whole number, got 2.5"),
        ({"num_steps": "4"}, "num_steps must be a whole number, got '4'"),
        ({"num_frames": float("nan")}, "num_frames must be a whole number, got nan"),
        ({"width": "64", "height": 64}, "width must be a whole number, got '64'"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"boundary": "x"}, "boundary must be a number, got 'x'"),
        ({"shift": float("inf")}, "shift must be a number, got inf"),
        ({"fps": 0}, "fps must be from 1 to 240, got 0"),
        ({"attention": "flash"}, "attention must be one of"),
        (
            {"precision": "fp4"},
            "precision must be one of auto, float32, bf16, int8, fp8, int8_block, got 'fp4'",
        ),
        ({"memory": "tight"}, "memory must be one of"),
        ({"noise_device": "mps"}, "noise_device must be one of cpu, cuda"),
        ({"gpu_budget": "lots"}, "a memory size looks like 12GB or 12GiB, got 'lots'"),
    ],
)
def test_bad_values_are_refused_in_one_line(values, line):
    with pytest.raises(RequestError, match=line) as error:
        GenerateRequest(**{"prompt": "a red circle", **values})
    assert isinstance(error.value, TurbowanError)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_frames", [1, 5, 33, 81, 121])
@pytest.mark.parametrize(("width", "height"), [(16, 16), (1920, 1088), (4096, 512)])
def test_good_sizes(num_frames, width, height):
    GenerateRequest(prompt="猫", num_frames=num_frames, width=width, height=height)


@pytest.mark.parametrize(
    ("text", "count"),
    [("12GB", 12 * 10**9), ("12 GiB", 12 * 2**30), ("1.5g", 1.5 * 10**9), (4096, 4096), ("512mib", 512 * 2**20)],
)
def test_memory_sizes(text, count):
    assert parse_bytes(text) == count
