"""The kernel of `qk_norm_rope`: on a GPU in bfloat16, else by Triton's interpreter."""

import pytest
import torch

from turbowan import ops
from turbowan.ops import OPERATIONS
from turbowan.ops.block_map import block_means

pytest.importorskip("triton")
from turbowan.ops.triton.qk_norm_rope import candidates
from turbowan.ops.triton.qk_norm_rope import qk_norm_rope as kernel

pytestmark = pytest.mark.usefixtures("fresh_seed")

eager = OPERATIONS["qk_norm_rope"].implementations[0].function
# the interpreter rounds to bfloat16 by cutting off
DTYPES = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float32, torch.float16]


def draw(device, dtype, batch, length, heads, size):
    """Views of one product, as the model has them."""
    qkv = torch.randn(batch, length, 3 * heads * size, device=device).to(dtype)
    q, k = (x.unflatten(-1, (heads, size)) for x in qkv.chunk(3, dim=-1)[:2])
    weights = (torch.rand(2, heads * size, device=device) + 0.5).to(dtype)
    angles = torch.rand(length, size // 2, device=device) * 6
    return q, k, *weights, angles.cos(), angles.sin()


def check(ours, args, block_q, block_k):
    """q and k but for a last bit of either rounding; the means are of the kernel's own q and k."""
    expected = eager(*args, 1e-6, 0, 0)
    for x, reference in zip(ours[:2], expected, strict=False):
        pair = reference.float().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(*x.shape[:-1], -1, 2)
        step = torch.finfo(x.dtype).eps * (4 if x.dtype == torch.float32 else 2)
        difference = (x.float() - reference.float()).abs()
        assert (difference <= step * pair.flatten(-2)).all(), f"off by {difference.max()}"
        if x.dtype != torch.float32:
            assert (difference > 0).float().mean() < 0.01
    for x, means, block in zip(ours[:2], ours[2:], (block_q, block_k), strict=True):
        if block:
            torch.testing.assert_close(means, block_means(x.transpose(1, 2), block), rtol=1e-5, atol=1e-6)
        else:
            assert means.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "size", "block_q", "block_k"),
    [
        (2, 5, 3, 128, 4, 2),
        (1, 70, 1, 64, 128, 64),
        (1, 66, 2, 128, 64, 0),
        (2, 3, 5, 64, 0, 0),
        (1, 7, 2, 128, 3, 5),
        (1, 1, 12, 128, 128, 64),
    ],
)
def test_q_k_and_means(kernels, guarded, dtype, batch, length, heads, size, block_q, block_k):
    args = draw(kernels, dtype, batch, length, heads, size)
    check(guarded(kernel, *args, 1e-6, block_q, block_k), args, block_q, block_k)


@pytest.mark.parametrize("config", candidates(), ids=str)
def test_every_candidate_of_the_sweep(kernels, guarded, config):
    args = draw(kernels, torch.float16, 1, 19, 2, 64)
    check(guarded(kernel, *args, 1e-6, 16, 16, config), args, 16, 16)


def test_twice_the_same(kernels):
    args = draw(kernels, torch.float16, 1, 5, 2, 64)
    for a, b in zip(kernel(*args, 1e-6, 4, 2), kernel(*args, 1e-6, 4, 2), strict=True):
        assert torch.equal(a, b)


def test_the_operation_takes_it_when_told(kernels):
    q, k, *rest = draw(kernels, torch.float16, 1, 5, 2, 64)
    with ops.force(qk_norm_rope="triton"):
        ours = ops.qk_norm_rope(q.flatten(2), k.flatten(2), *rest, 1e-6, 4, 2)
    for a, b in zip(ours, kernel(q, k, *rest, 1e-6, 4, 2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("heads", [12, 40])
def test_true_sizes(guarded, heads):
    args = draw("cuda", torch.bfloat16, 1, 32760, heads, 128)
    ours = guarded(kernel, *args, 1e-6, 128, 64)
    for _ in range(99):
        for a, b in zip(kernel(*args, 1e-6, 128, 64), ours, strict=True):
            assert torch.equal(a, b)
    check(ours, args, 128, 64)
