"""The kernel of `rms_norm`: on a GPU in bfloat16, else by Triton's interpreter."""

import pytest
import torch

from turbowan import ops
from turbowan.ops import OPERATIONS

pytest.importorskip("triton")
from turbowan.ops import triton as offers
from turbowan.ops.triton.rms_norm import candidates
from turbowan.ops.triton.rms_norm import rms_norm as kernel

pytestmark = pytest.mark.usefixtures("fresh_seed")

eager = OPERATIONS["rms_norm"].implementations[0].function
# the interpreter rounds to bfloat16 by cutting off
DTYPES = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float32, torch.float16]


def check(ours, x, weight):
    expected = eager(x, weight, 1e-6)
    assert ours.stride() == torch.empty_like(x).stride()  # as the operation promises
    step = torch.finfo(x.dtype).eps * (4 if x.dtype == torch.float32 else 1)
    difference = (ours.float() - expected.float()).abs()
    assert (difference <= step * expected.float().abs()).all()
    if x.dtype != torch.float32:
        assert (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 300, 1536])
def test_rows(kernels, guarded, dtype, width):
    x, weight = torch.randn(2, 2, width, device=kernels).to(dtype), torch.randn(width, device=kernels).to(dtype)
    check(guarded(kernel, x, weight, 1e-6), x, weight)


def test_any_strides(kernels, guarded):
    wide, weight = torch.randn(3, 2, 400, device=kernels).half(), torch.randn(100, device=kernels)
    for x in (wide[..., 50:150], wide[..., ::4], wide[..., :100].transpose(0, 1), wide[0, :, :100], wide[0, 0, :100],
              wide.view(3, 2, 4, 100), wide.view(3, 8, 100).transpose(0, 1)):  # fmt: skip
        check(guarded(kernel, x, weight, 1e-6), x, weight)


@pytest.mark.parametrize("config", candidates(), ids=str)
def test_every_candidate_of_the_sweep(kernels, guarded, config):
    x, weight = torch.randn(1, 2, 640, device=kernels).half(), torch.randn(640, device=kernels)
    check(guarded(kernel, x, weight, 1e-6, config), x, weight)


def test_the_operation_takes_it_when_told(kernels):
    x, weight = torch.randn(2, 300, device=kernels).half(), torch.randn(300, device=kernels)
    with ops.force(rms_norm="triton"):
        assert torch.equal(ops.rms_norm(x, weight), kernel(x, weight, 1e-6))


def test_a_kernel_is_imported_once(kernels, monkeypatch):
    """Not at every launch."""
    imported, plain = [], offers.import_module
    monkeypatch.setattr(offers, "import_module", lambda *name: imported.append(name) or plain(*name))
    offers._load.cache_clear()
    x, weight = torch.randn(2, 300, device=kernels).half(), torch.randn(300, device=kernels)
    with ops.force(rms_norm="triton"):
        for _ in range(3):
            ops.rms_norm(x, weight)
    assert len(imported) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [1536, 5120])
def test_true_sizes(guarded, width):
    x = torch.randn(1, 32760, 2 * width, device="cuda", dtype=torch.bfloat16)[..., width:]
    weight = torch.rand(width, device="cuda", dtype=torch.bfloat16)
    ours = guarded(kernel, x, weight, 1e-6)
    for _ in range(99):
        assert torch.equal(kernel(x, weight, 1e-6), ours)
    check(ours, x, weight)
