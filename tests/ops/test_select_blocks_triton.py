"""The selection's kernels against `block_map`: on a GPU, else by Triton's interpreter."""

import pytest
import torch

from turbowan import ops
from turbowan.ops.block_map import block_means, kept_blocks, selected_from_means

pytest.importorskip("triton")
from turbowan.ops.triton import select_blocks as kernels_of

pytestmark = pytest.mark.usefixtures("fresh_seed")

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float32, torch.float16]
GEOMETRIES = [(128, 64), (64, 128), (64, 64)]


def select(q, k, ratio, block_q, block_k):
    """All kernels of the selection in turn, q and k [B, L, H, D]."""
    q_means, k_means = kernels_of.block_means(q, block_q), kernels_of.block_means(k, block_k)
    k_mean = kernels_of.token_means(k_means, k.shape[1], block_k)
    return kernels_of.select_blocks(q_means, k_means, k_mean, ratio)


def as_map(lists, key_blocks):
    return torch.zeros(*lists.shape[:-1], key_blocks, dtype=torch.int8, device=lists.device).scatter_(
        -1, lists.long(), 1
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("length", [1, 128, 333])
def test_block_means(kernels, guarded, dtype, block, length):
    x = torch.randn(2, 3, length, 2, 64, device=kernels).to(dtype)[:, 1]  # heads of a larger tensor
    ours = guarded(kernels_of.block_means, x, block)
    expected = block_means(x.transpose(1, 2), block)
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)
    mean = guarded(kernels_of.token_means, ours, length, block)
    assert torch.allclose(mean, x.float().mean(dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("block_q", "block_k"), GEOMETRIES)
@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0])
def test_whole_numbers_give_the_same_lists(kernels, guarded, block_q, block_k, ratio):
    """Every sum is exact here, and many scores are equal: the lowest index is kept first."""
    q, k = torch.randint(-2, 3, (2, 2, 896, 1 + ON_GPU, 64), device=kernels).to(DTYPES[0]).unbind(0)
    k[:, 448:] = -k[:, :448]  # mean 0
    ours = guarded(select, q, k, ratio, block_q, block_k)
    expected = ops.block_map(q.transpose(1, 2), k.transpose(1, 2), ratio, block_q, block_k)
    assert ours.dtype == torch.int32
    assert (ours.diff(dim=-1) > 0).all(), "not ascending"
    assert torch.equal(as_map(ours, expected.shape[-1]), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("length", [1, 450])
def test_random_lists_differ_in_near_ties_only(kernels, dtype, geometry, length):
    q, k = (torch.randn(1, length, 2, 128, device=kernels).to(dtype) for _ in range(2))
    k = k + torch.randn(2, 128, device=kernels).to(dtype)
    means = [block_means(x.transpose(1, 2), block) for x, block in zip((q, k), geometry, strict=True)]
    ours = as_map(select(q, k, 0.4, *geometry), means[1].shape[2]).bool()
    expected = as_map(selected_from_means(*means, length, 0.4, geometry[1]), means[1].shape[2]).bool()
    assert (ours.sum(dim=-1) == expected.sum(dim=-1)).all()
    scores = means[0] @ (means[1] - k.float().mean(dim=1)[:, :, None]).transpose(-1, -2)
    lowest = scores.masked_fill(~ours, torch.inf).amin(dim=-1)
    highest = scores.masked_fill(ours, -torch.inf).amax(dim=-1)
    assert (lowest >= highest - 2**-6 * scores.abs().amax(dim=-1)).all()
    assert (ours != expected).any(dim=-1).sum() <= 3  # of at most 28 rows


@pytest.mark.parametrize("key_blocks", [1, 33, 1182, 2700])
def test_rows_of_every_length(kernels, guarded, key_blocks):
    """Against PyTorch's sort, which takes over for rows that are longer still."""
    q_means, k_means = (torch.randn(1, 2, n, 64, device=kernels) for n in (3, key_blocks))
    k_mean = k_means.mean(dim=2)
    ours = guarded(kernels_of.select_blocks, q_means, k_means, k_mean, 0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels_of, "LONGEST_ROW", 0)
        expected = kernels_of.select_blocks(q_means, k_means, k_mean, 0.1)
    assert ours.shape[-1] == kept_blocks(0.1, key_blocks)
    assert torch.equal(ours, expected)


def test_not_a_number_still_lists_blocks_that_exist(kernels):
    """Whatever the scores, what the attention kernel reads lies inside."""
    q_means, k_means = (torch.randn(1, 1, n, 64, device=kernels) for n in (4, 40))
    q_means[0, 0, 0, 0] = torch.nan
    k_means[0, 0, 5, 0], q_means[0, 0, 2, 0] = torch.inf, -torch.inf
    lists = kernels_of.select_blocks(q_means, k_means, torch.zeros(1, 1, 64, device=kernels), 0.5)
    assert (lists.diff(dim=-1) > 0).all()
    assert lists.min() >= 0
    assert lists.max() < 40
