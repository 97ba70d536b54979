"""The kernels of `causal_input` and `upsample`: on a GPU in bfloat16, else by Triton's interpreter."""

import pytest
import torch

from turbowan import ops
from turbowan.ops import OPERATIONS

pytest.importorskip("triton")
from turbowan.ops.triton.causal_input import candidates
from turbowan.ops.triton.causal_input import causal_input as causal_kernel
from turbowan.ops.triton.upsample import upsample as upsample_kernel

pytestmark = pytest.mark.usefixtures("fresh_seed")

causal_eager = OPERATIONS["causal_input"].implementations[0].function
upsample_eager = OPERATIONS["upsample"].implementations[0].function
# the interpreter rounds to bfloat16 by cutting off
DTYPES = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float32, torch.float16]


def draw(kernels, dtype, *shape):
    return torch.randn(shape, device=kernels).to(dtype)


def check_close(ours, expected):
    """Equal but for the last bit, in 16 bits of few numbers only."""
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    step = torch.finfo(ours.dtype).eps * (16 if ours.dtype == torch.float32 else 1)
    difference = (ours.float() - expected.float()).abs()
    assert (difference <= step * expected.float().abs() + 1e-6).all()
    if ours.dtype != torch.float32:
        assert (difference > 0).sum() <= 0.02 * ours.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [12, 96] if torch.cuda.is_available() else [12])
@pytest.mark.parametrize(
    ("bias", "residual", "gamma", "past", "silu", "lookback", "frames", "keep", "margin"),
    [
        (False, 0, True, False, True, 2, 3, False, 0),
        (True, 3, True, True, True, 2, 3, True, 1),
        (True, 2, True, False, True, 2, 5, True, 0),  # a steady clip: both repeat their last frame
        (True, 0, True, True, True, 2, 3, False, 0),
        (False, 3, True, False, False, 0, 3, True, 0),  # before the attention
        (True, 2, True, True, True, 2, 4, False, 1),
        (True, 0, False, True, False, 1, 3, False, 0),  # before a convolution over time
        (True, 3, False, False, False, 2, 4, True, 2),
    ],
)
def test_causal_input(
    kernels, guarded, dtype, channels, bias, residual, gamma, past, silu, lookback, frames, keep, margin
):
    size = (5, 7, channels)  # no multiple of what a program takes
    args = (
        draw(kernels, dtype, 2, 3, *size),
        draw(kernels, dtype, channels) if bias else None,
        draw(kernels, dtype, 2, residual, *size) if residual else None,
        draw(kernels, dtype, channels) if gamma else None,
        draw(kernels, dtype, 2, lookback, *size) if past else None,
        silu, lookback, frames, keep, margin,
    )  # fmt: skip
    ours, expected = guarded(causal_kernel, *args), causal_eager(*args)
    for x, y in zip(ours, expected, strict=True):
        check_close(x, y)
    for x, y in zip(ours, causal_kernel(*args), strict=True):
        assert torch.equal(x, y)


def test_positions_without_length_and_large_values(kernels):
    x = torch.zeros(1, 2, 3, 3, 32, device=kernels, dtype=torch.float16)
    x[:, 1] = 200 * torch.randn(3, 3, 32)
    args = (x, None, None, torch.full((32,), 30.0, device=kernels).half(), None, True, 2, 2, False, 0)
    ours, expected = causal_kernel(*args)[0], causal_eager(*args)[0]
    assert torch.equal(ours[:, :3], torch.zeros_like(ours[:, :3]))
    check_close(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "per_frame", "bias", "residual", "first"),
    [(96, 1, True, True, 0), (12, 2, True, False, 1), (8, 2, True, False, 0), (16, 1, False, False, 0)],
)
def test_upsample(kernels, guarded, dtype, channels, per_frame, bias, residual, first):
    x = draw(kernels, dtype, 2, 3, 5, 7, per_frame * channels)
    args = (
        x,
        draw(kernels, dtype, per_frame * channels) if bias else None,
        draw(kernels, dtype, *x.shape) if residual else None,
        draw(kernels, dtype, 2, first, 5, 7, channels) if first else None,
        per_frame,
    )
    check_close(guarded(upsample_kernel, *args), upsample_eager(*args))
    assert torch.equal(upsample_kernel(*args), upsample_kernel(*args))


@pytest.mark.parametrize("config", candidates(), ids=str)
def test_every_candidate_of_the_sweep(kernels, guarded, config):
    x, bias = draw(kernels, torch.float16, 1, 2, 9, 5, 48), draw(kernels, torch.float16, 48)
    args = (x, bias, x, bias, None, True, 2, 2, True, 1)
    check_close(guarded(causal_kernel, *args, config)[0], causal_eager(*args)[0])
    check_close(guarded(upsample_kernel, x, bias, x, None, 1, config), upsample_eager(x, bias, x, None, 1))


def test_any_strides_and_the_operation_takes_it_when_told(kernels):
    x = draw(kernels, torch.float16, 2, 16, 3, 4, 5).movedim(1, -1)
    with ops.force(causal_input="triton", upsample="triton"):
        ours = ops.causal_input(x, residual=x, lookback=1), ops.upsample(x, residual=x)
    check_close(ours[0][0], causal_eager(x, None, x, None, None, False, 1, 3, False, 0)[0])
    check_close(ours[1], upsample_eager(x, None, x, None, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("frames", "height", "width", "channels"), [(20, 480, 832, 96), (12, 720, 1280, 192)])
def test_true_sizes(guarded, frames, height, width, channels):
    """Outputs past 2^31 elements, and all of them the same twice."""
    x, residual = (torch.randn(1, frames, height, width, channels, device="cuda").bfloat16() for _ in range(2))
    bias, gamma = (torch.randn(channels, device="cuda").bfloat16() for _ in range(2))
    past = residual[:, :2].contiguous()
    args = (x, bias, residual, gamma, past, True, 2, frames, True, 1)
    ours = guarded(causal_kernel, *args)
    for i in range(0, frames, 4):  # the eager twin takes float32 copies
        part = (x[:, i : i + 4], bias, residual[:, i : i + 4], gamma, past, True, 2, 4, True, 1)
        expected = causal_eager(*part)
        check_close(ours[0][:, 2 + i : 6 + i], expected[0][:, 2:])
        check_close(ours[1][:, i : i + 4], expected[1])
    assert torch.equal(ours[0][:, :2, :, 1:-1], past)
    assert all(torch.equal(a, b) for a, b in zip(causal_kernel(*args), ours, strict=True))
    del ours
    half = x[:, :, : height // 2, : width // 2].contiguous()
    check_close(upsample_kernel(half, bias, None, None, 1), upsample_eager(half, bias, None, None, 1))
