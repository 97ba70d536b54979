"""The specification of RMSNorm, rotation and block means of q and k."""

import pytest
import torch

from turbowan import ops
from turbowan.errors import RequestError
from turbowan.ops.block_map import block_means

pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_steps_one_after_the_other(dtype):
    qkv = torch.randn(2, 12, 3 * 128).to(dtype)
    weights = torch.rand(2, 128) + 0.5
    table = ops.rope_table(2, 3, 2, 64)
    parts = qkv.chunk(3, dim=-1)[:2]
    *ours, q_means, k_means = ops.qk_norm_rope(*parts, *weights, *table, 1e-6, 8, 4)
    for x, part, weight, means, block in zip(ours, parts, weights, (q_means, k_means), (8, 4), strict=True):
        assert torch.equal(x, ops.rope(ops.rms_norm(part, weight).unflatten(-1, (2, 64)), *table))
        assert means.dtype == torch.float32
        assert means.shape == (2, 2, -(-12 // block), 64)
        assert torch.equal(means, block_means(x.transpose(1, 2), block))


def test_short_blocks_count_their_true_rows():
    q = torch.randn(1, 6, 64)
    q, _, means, none = ops.qk_norm_rope(q, q, *torch.ones(2, 64), *ops.rope_table(1, 2, 3, 64), 1e-6, 4)
    assert torch.allclose(means[0, 0, 1], q[0, 4:, 0].mean(dim=0), atol=1e-6)
    assert none.numel() == 0


def test_refuses_another_length():
    q = torch.randn(1, 5, 64)
    with pytest.raises(RequestError, match="rotation is for 6 tokens of head size 64"):
        ops.qk_norm_rope(q, q, *torch.ones(2, 64), *ops.rope_table(1, 2, 3, 64))
