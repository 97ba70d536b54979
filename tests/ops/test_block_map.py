"""The selection of key blocks: recorded maps, the rules one by one, and an independent search on fresh input."""

import math

import pytest
import torch

from turbowan import ops
from turbowan.errors import RequestError
from turbowan.ops.block_map import kept_blocks

pytestmark = pytest.mark.usefixtures("fresh_seed")


def blocks_of(x, block):
    """[B, H, L, D] -> list of [B, H, rows, D], the last one possibly short."""
    return [x[:, :, start : start + block] for start in range(0, x.shape[2], block)]


def float64_scores(q, k, block_q, block_k):
    k = k.double() - k.double().mean(dim=2, keepdim=True)
    q_means, k_means = (
        torch.stack([b.double().mean(dim=2) for b in blocks_of(x, n)], dim=2) for x, n in ((q, block_q), (k, block_k))
    )
    return q_means @ k_means.transpose(-1, -2), q_means.norm(dim=-1)[..., None] * k_means.norm(dim=-1)[:, :, None]


@pytest.mark.parametrize("ratio", ["0.2", "0.5"])
@pytest.mark.parametrize("size", [64, 128])
def test_recorded_maps_are_identical(size, ratio, recorded):
    q, k, expected = recorded("ops.safetensors", f"q{size}", f"k{size}", f"map{size}@{ratio}")
    ours = ops.block_map(q.transpose(1, 2), k.transpose(1, 2), float(ratio))
    assert ours.dtype == torch.int8
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(("block_q", "block_k"), [(128, 64), (64, 128), (64, 64)])
@pytest.mark.parametrize("length", [1, 63, 65, 700, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_highest_scores(length, block_q, block_k, dtype):
    """In float64, what is kept scores no less than what is dropped, up to bfloat16 rounding."""
    q, k = (torch.randn(2, 3, length, 64, dtype=dtype) + torch.randn(2, 3, 1, 64, dtype=dtype) for _ in range(2))
    ratio = 0.3
    kept = ops.block_map(q, k, ratio, block_q, block_k).bool()
    scores, size = float64_scores(q, k, block_q, block_k)
    key_blocks = math.ceil(length / block_k)
    assert kept.shape == (2, 3, math.ceil(length / block_q), key_blocks)
    assert (kept.sum(dim=-1) == max(1, math.floor(ratio * key_blocks))).all()
    lowest_kept = scores.masked_fill(~kept, math.inf).amin(dim=-1)
    highest_dropped = scores.masked_fill(kept, -math.inf).amax(dim=-1)
    slack = (4 if dtype == torch.float32 else 16) * 2**-8 * size.amax(dim=-1)
    assert (lowest_kept >= highest_dropped - slack).all()


@pytest.mark.parametrize(
    ("ratio", "key_blocks", "expected"),
    [(0.1, 9, 1), (0.1, 10, 1), (0.1, 19, 1), (0.1, 20, 2), (0.15, 512, 76), (0.1, 1182, 118), (1.0, 7, 7)],
)
def test_kept_count_is_the_floor_and_at_least_one(ratio, key_blocks, expected):
    assert kept_blocks(ratio, key_blocks) == expected
    q, k = torch.randn(1, 1, 5, 8), torch.randn(1, 1, key_blocks, 8)
    assert ops.block_map(q, k, ratio, block_q=2, block_k=1).sum(dim=-1).tolist() == [[[expected] * 3]]


def test_equal_scores_keep_the_lowest_index():
    q, k = torch.zeros(1, 1, 256, 64), torch.randn(1, 1, 640, 64)
    assert ops.block_map(q, k, 0.4)[0, 0].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0, 0, 0]] * 2


def test_k_mean_is_taken_off():
    """A shift of all keys, however large, changes no map. Sums are exact here: whole numbers, 512 rows."""
    q = torch.randint(-9, 10, (2, 2, 300, 64)).float()
    k = torch.randint(-9, 10, (2, 2, 512, 64)).float()
    k[:, :, 1::2] = -k[:, :, ::2][:, :, torch.randperm(256)]  # mean 0
    shift = torch.randint(-1000, 1000, (2, 2, 1, 64)).float()
    assert torch.equal(ops.block_map(q, k + shift, 0.25), ops.block_map(q, k, 0.25))


def alternating(values):
    """Keys [1, 1, 4, D], one per block, whose mean is zero: the two given rows and their negatives."""
    values = torch.tensor(values)
    return torch.cat([values, -values])[None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_rounded_to_bfloat16(dtype):
    """Block 1 scores 1 + 2^-12, block 0 scores 1: equal after rounding, so the lower index is kept."""
    q = torch.tensor([[[[1.0, 2**-12]]]], dtype=dtype)
    k = alternating([[1.0, 0.0], [1.0, 1.0]]).to(dtype)
    assert ops.block_map(q, k, 0.25, 1, 1)[0, 0, 0].tolist() == [1, 0, 0, 0]


def test_block_means_are_rounded_to_bfloat16():
    """1 + 2^-12 counts as 1, so that block 0 scores 1 - 1 = 0 and block 1, of 2^-13, is kept."""
    fine, coarse = [1.0 + 2**-12, 1.0], [1.0, -1.0]
    for q, k in ((coarse, fine), (fine, coarse)):
        keys = alternating([k, [2**-13, 0.0]])
        assert ops.block_map(torch.tensor([[[q]]]), keys, 0.25, 1, 1)[0, 0, 0].tolist() == [0, 1, 0, 0]


def test_short_last_block_is_averaged_over_its_own_rows():
    """The last key block has one row; divided by a full block's count its score would be 64 times smaller."""
    k = torch.zeros(1, 1, 129, 4)
    k[0, 0, :64, 0], k[0, 0, 64:128, 0], k[0, 0, 128, 0] = 1.0, -1.125, 8.0
    q = torch.zeros(1, 1, 3, 4)
    q[..., 0] = 1
    assert ops.block_map(q, k, 0.34)[0, 0].tolist() == [[0, 0, 1]]


def test_samples_and_heads_are_independent():
    q, k = torch.randn(3, 2, 200, 64), torch.randn(3, 2, 200, 64)
    whole = ops.block_map(q, k, 0.5)
    for b in range(3):
        for h in range(2):
            one = ops.block_map(q[b : b + 1, h : h + 1], k[b : b + 1, h : h + 1], 0.5)
            assert torch.equal(one[0, 0], whole[b, h])


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, math.nan])
def test_refuses_a_ratio_out_of_range(ratio):
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(RequestError, match="sla_topk must be in"):
        ops.block_map(q, q, ratio)
