"""The kernel of `gelu_rows`: on a GPU in bfloat16, else by Triton's interpreter."""

import pytest
import torch

from turbowan import ops
from turbowan.ops import OPERATIONS
from turbowan.ops.rows import FORMATS, sample_rows

pytest.importorskip("triton")
from turbowan.ops.triton.gelu_rows import candidates
from turbowan.ops.triton.gelu_rows import gelu_rows as kernel

pytestmark = [
    pytest.mark.usefixtures("fresh_seed"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # NumPy's, in the interpreter
]

eager = OPERATIONS["gelu_rows"].implementations[0].function
# the interpreter rounds to bfloat16 by cutting off
DTYPES = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float32, torch.float16]


def check_rows(rows, x):
    """Within the last bit of the true value; PyTorch's own loses some where 1 + tanh cancels."""
    wide = x.double()
    expected = (wide * (2 * 0.7978845608028654 * (wide + 0.044715 * wide**3)).sigmoid()).view(rows.shape)
    step = torch.finfo(x.dtype).eps * (256 if x.dtype == torch.float32 else 1)  # exp(-2 u) has u's error 2 u times
    smallest = max(1e-9, torch.finfo(x.dtype).smallest_normal)
    assert ((rows.double() - expected).abs() <= step * expected.abs() + smallest).all()
    specified = eager(x if x.ndim == 3 else x[None], "bf16")[0].double()
    assert ((rows.double() - specified).abs() <= step * expected.abs() + 2e-6).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [300, 512, 2560])
def test_rows(kernels, guarded, dtype, width):
    x = (torch.randn(2, 2, width, device=kernels) * 4).to(dtype)
    rows, scale = guarded(kernel, x, "bf16")
    check_rows(rows, x)
    assert scale.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_ends(kernels, dtype):
    big = min(1e30, torch.finfo(dtype).max)
    x = torch.tensor([-big, -30.0, 0.0, 30.0, big, torch.inf, torch.nan], device=kernels).to(dtype).view(1, 1, -1)
    rows = kernel(x, "bf16")[0][0].float()
    assert torch.equal(rows[:-1], x.float()[0, 0, :-1].clamp(min=0))
    assert rows[-1].isnan()


SHAPES = [(format, *shape) for format in FORMATS[1:] for shape in ((2, 3, 300), (1, 2, 512))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("format", "batch", "length", "width"), [*SHAPES, ("int8_block", 2, 130, 140)])
def test_codes_are_those_of_the_rows(kernels, guarded, rounded_rows, dtype, format, batch, length, width):
    wide = torch.randn(batch, 2 * length, width + 8, device=kernels).to(dtype)
    x = wide[:, length:, :width]
    rows = kernel(x, "bf16")[0].view(batch, length, width)
    codes, scale = guarded(kernel, x, format)
    expected, steps = rounded_rows(sample_rows(rows, format), format)
    assert torch.equal(codes.float(), expected.float())
    assert torch.equal(scale, steps)


@pytest.mark.parametrize("format", ["int8_row", "fp8_row"])
def test_division_is_exact(kernels, rounded_rows, format):
    """Every bfloat16 number in 8..32 by the scale of every largest number in 16..32: halves of codes among them, where
    the last bit of the quotient decides. GELU leaves such numbers as they are."""
    numbers = torch.cat([torch.arange(128, 256) / 16, torch.arange(128, 256) / 8])
    numbers = numbers[torch.randperm(256)].to(kernels, DTYPES[0])
    largest = (16 + torch.randperm(128)[: 128 if kernels.type == "cuda" else 12] / 8).to(kernels, DTYPES[0])
    x = torch.where(numbers <= largest[:, None], numbers, 0.0)
    codes, scale = kernel(x[None], format)
    expected, steps = rounded_rows(x, format)
    assert torch.equal(codes.float(), expected.float())
    assert torch.equal(scale, steps)


@pytest.mark.parametrize("format", ["int8_row", "int8_block"])
def test_zeros_and_nan(kernels, rounded_rows, format):
    x = torch.zeros(1, 2, 300, device=kernels, dtype=torch.float16)
    codes, scale = kernel(x, format)
    assert not codes.any()
    assert torch.equal(scale, rounded_rows(x[0], format)[1])
    x[0, 1, 7] = torch.nan
    assert kernel(x, format)[1].isnan().any()


@pytest.mark.parametrize("config", candidates(), ids=str)
def test_every_candidate_of_the_sweep(kernels, guarded, config):
    x = torch.randn(1, 2, 640, device=kernels).to(torch.float16)
    for format in ("int8_row", "int8_block"):
        for a, b in zip(guarded(kernel, x, format, config), kernel(x, format), strict=True):
            assert torch.equal(a, b)


def test_twice_the_same(kernels):
    x = torch.randn(2, 2, 300, device=kernels).to(torch.float16)
    for a, b in zip(kernel(x, "int8_row"), kernel(x, "int8_row"), strict=True):
        assert torch.equal(a, b)


def test_the_operation_takes_it_when_told(kernels):
    x = torch.randn(3, 300, device=kernels).to(torch.float16)
    with ops.force(gelu_rows="triton"):
        ours = ops.gelu_rows(x, "int8_row")
    for a, b in zip(ours, kernel(x[None], "int8_row"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("width", [8960, 13824])
def test_true_sizes(guarded, rounded_rows, format, width):
    x = torch.randn(1, 32760, width, device="cuda", dtype=torch.bfloat16) * 2
    rows, scale = guarded(kernel, x, format)
    for _ in range(99):
        again = kernel(x, format)
        assert torch.equal(again[0].view(torch.uint8), rows.view(torch.uint8))
        assert torch.equal(again[1], scale)
    plain = kernel(x, "bf16")[0]
    for part, of in zip(plain.split(4096), x[0].split(4096), strict=True):
        check_rows(part, of)
    codes, steps = rounded_rows(plain, format)
    assert torch.equal(rows.float(), codes.float())  # as numbers: e4m3 has a -0, which the kernel may leave out
    assert torch.equal(scale, steps)
