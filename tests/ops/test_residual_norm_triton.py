"""The kernel of `residual_norm` against its specification: on a GPU in bfloat16, else by Triton's interpreter."""

import pytest
import torch

from turbowan import ops
from turbowan.ops import OPERATIONS
from turbowan.ops.rows import FORMATS, sample_rows

pytest.importorskip("triton")
from turbowan.ops.triton.residual_norm import candidates
from turbowan.ops.triton.residual_norm import residual_norm as kernel

pytestmark = pytest.mark.usefixtures("fresh_seed")

eager = OPERATIONS["residual_norm"].implementations[0].function
# the interpreter rounds to bfloat16 by cutting off
DTYPES = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float32, torch.float16]


def draw(device, dtype, batch=2, length=2, width=300):
    """Everything residual_norm takes: changes as a part of a wider tensor, modulation as views of one, an odd mean."""
    x = (torch.randn(batch, length, width, device=device) * 3 + torch.randn(batch, length, 1, device=device)).to(dtype)
    delta = torch.randn(batch, length, 2 * width, device=device).to(dtype)[..., width:]
    weight, bias = torch.randn(2, width, device=device).to(dtype).unbind(0)
    shift, scale, gate = torch.randn(batch, 6, width, device=device).unsqueeze(2).unbind(1)[:3]
    return {"x": x, "delta": delta, "gate": gate, "weight": weight, "bias": bias, "shift": shift, "scale": scale}


def without(inputs, *names):
    return [None if name in names else x for name, x in inputs.items()]


def check_rows(ours, theirs, args):
    """Equal but for a last bit: sums in another order may turn a rounding, and modulation then enlarges the step."""
    x_new, *_, shift, scale = args
    size = theirs.float().abs().unflatten(0, (x_new.shape[0], -1))
    if scale is not None:
        size = 2 * size + 2 * shift.abs()  # |normed * (1 + scale)| is at most |row| + |shift|; the row is rounded again
    step = torch.finfo(ours.dtype).eps * (4 if ours.dtype == torch.float32 else 1)
    difference = (ours.float() - theirs.float()).abs()
    assert (difference <= step * size.flatten(0, 1) + 1e-5).all(), f"off by {difference.max()}"
    if ours.dtype != torch.float32:
        assert (difference > 0).float().mean() < 0.01


ABSENT = [(), ("weight", "bias"), ("shift", "scale"), ("gate", "shift", "scale"), ("delta", "gate", "weight", "bias"),
          ("delta", "gate", "weight", "bias", "shift", "scale")]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("absent", ABSENT, ids="-".join)
@pytest.mark.parametrize("variance", ["exact", "official"])
def test_sums_and_rows(kernels, guarded, dtype, absent, variance):
    args = without(draw(kernels, dtype), *absent)
    x_new, rows, scale = guarded(kernel, *args, 1e-6, variance, "bf16")
    expected = eager(*args, 1e-6, variance, "bf16")
    assert torch.equal(x_new, expected[0])
    check_rows(rows, expected[1], args)
    assert scale.numel() == 0


SHAPES = [(format, *shape) for format in FORMATS[1:] for shape in ((2, 3, 300), (1, 2, 512))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("format", "batch", "length", "width"), [*SHAPES, ("int8_block", 1, 130, 140)])
def test_codes_are_those_of_the_rows(kernels, guarded, rounded_rows, dtype, format, batch, length, width):
    args = without(draw(kernels, dtype, batch, length, width), "weight", "bias")
    rows = kernel(*args, 1e-6, "exact", "bf16")[1].view(batch, length, width)
    x_new, codes, scale = guarded(kernel, *args, 1e-6, "exact", format)
    expected, steps = rounded_rows(sample_rows(rows, format), format)
    assert torch.equal(codes.float(), expected.float())
    assert torch.equal(scale, steps)
    assert torch.equal(x_new, eager(*args, 1e-6, "exact", "bf16")[0])


@pytest.mark.parametrize("config", candidates(), ids=str)
def test_every_candidate_of_the_sweep(kernels, guarded, config):
    for format, length, width in (("bf16", 2, 640), ("int8_block", 40, 260)):  # 40 rows: more than a block's slab
        args = without(draw(kernels, torch.float16, 1, length, width), "weight", "bias")
        ours = guarded(kernel, *args, 1e-6, "exact", format, config)
        usual = kernel(*args, 1e-6, "exact", format)
        assert torch.equal(ours[0], usual[0])
        if format == "bf16":
            check_rows(ours[1], usual[1], args)
        else:  # sums in another order may turn a rounding of the rows: by a code, and by their last bit in a scale
            assert (ours[1].int() - usual[1].int()).abs().max() <= 1
            torch.testing.assert_close(ours[2], usual[2], rtol=4e-3, atol=0)


def test_twice_the_same(kernels):
    args = (*without(draw(kernels, torch.float16)), 1e-6, "official", "int8_row")
    for a, b in zip(kernel(*args), kernel(*args), strict=True):
        assert torch.equal(a, b)


def test_x_may_be_strided(kernels):
    wide = torch.randn(3, 2, 400, device=kernels).to(torch.float16)
    for x in (wide.transpose(0, 1), wide[:, :, 100:], wide[:, :, ::2]):
        ours = kernel(x, x, None, None, None, None, None, 1e-6, "exact", "bf16")
        plain = kernel(x.contiguous(), x.contiguous(), None, None, None, None, None, 1e-6, "exact", "bf16")
        assert torch.equal(ours[0], plain[0])
        assert torch.equal(ours[1], plain[1])


def test_nan_shows(kernels):
    x = torch.randn(1, 2, 256, device=kernels).to(torch.float16)
    x[0, 1, 7] = torch.nan
    for format in ("int8_row", "int8_block"):
        scale = kernel(x, None, None, None, None, None, None, 1e-6, "exact", format)[2]
        assert scale[-1].isnan().any()
    assert not kernel(x, None, None, None, None, None, None, 1e-6, "exact", "int8_row")[2][0].isnan()


def test_the_operation_takes_it_when_told(kernels):
    args = draw(kernels, torch.float16)
    with ops.force(residual_norm="triton"):
        ours = ops.residual_norm(*args.values(), format="int8_row")
    for a, b in zip(ours, kernel(*args.values(), 1e-6, "exact", "int8_row"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("width", [1536, 5120])
def test_true_sizes(guarded, rounded_rows, format, width):
    args = without(draw("cuda", torch.bfloat16, 1, 32760, width), "weight", "bias")
    x_new, rows, scale = guarded(kernel, *args, 1e-6, "exact", format)
    for _ in range(99):
        again = kernel(*args, 1e-6, "exact", format)
        assert torch.equal(again[1].view(torch.uint8), rows.view(torch.uint8))
        assert torch.equal(again[2], scale)
    expected = eager(*args, 1e-6, "exact", "bf16")
    assert torch.equal(x_new, expected[0])
    plain = kernel(*args, 1e-6, "exact", "bf16")[1]
    check_rows(plain, expected[1], args)
    codes, steps = rounded_rows(plain, format)
    assert torch.equal(rows.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(scale, steps)
