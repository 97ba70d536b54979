"""Dense attention against its formula, and the last key that stands for many."""

import sys

import pytest
import torch

from turbowan import ops
from turbowan.errors import RequestError

pytestmark = pytest.mark.usefixtures("fresh_seed")


def formula(q, k, v):
    """softmax(q k^T / sqrt(D)) v in float64 on [B, L, H, D]."""
    q, k, v = q.double(), k.double(), v.double()
    weights = (torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return torch.einsum("bhlm,bmhd->blhd", weights, v)


@pytest.mark.parametrize(("length", "keys", "size"), [(1, 1, 128), (77, 130, 64), (200, 3, 128), (65, 512, 128)])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_is_softmax_of_scaled_products(length, keys, size, dtype, bar, relative_error):
    q, k, v = (torch.randn(2, n, 3, size, dtype=dtype) for n in (length, keys, keys))
    out = ops.attention(q, k, v)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert relative_error(out, formula(q, k, v)) <= bar


@pytest.mark.parametrize("count", [1, 2, 3, 21, 491, 512])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_last_key_count_equals_that_many_keys(count, dtype, bar, relative_error):
    """Also where the last key takes most of the weight, as the padding of a prompt does."""
    q, k, v = (torch.randn(2, n, 2, 128, dtype=dtype) for n in (40, 22, 22))
    k[:, -1] = 0.25 * q.mean(dim=1)
    out = ops.attention(q, k, v, last_key_count=count)
    full = [torch.cat([x, x[:, -1:].expand(-1, count - 1, -1, -1)], dim=1) for x in (k, v)]
    assert relative_error(out, formula(q, *full)) <= bar


@pytest.mark.parametrize("count", [2, 21, 150, 300, 491])
def test_last_key_weighs_its_count_in_bfloat16(count):
    """The count enters through a logit; rounded there, it would be off by up to 1.6 %."""
    others = 2000
    q, k, v = (torch.zeros(1, n, 1, 128, dtype=torch.bfloat16) for n in (1, others + 1, others + 1))
    v[:, -1] = 1
    share = ops.attention(q, k, v, last_key_count=count).double().mean().item()
    assert share == pytest.approx(count / (count + others), rel=2**-8)


def test_does_not_write_to_its_inputs():
    q, k, v = (torch.randn(1, 9, 2, 64) for _ in range(3))
    before = [x.clone() for x in (q, k, v)]
    ops.attention(q, k, v, last_key_count=7)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


@pytest.mark.parametrize("count", [1, 40])
def test_tangents_come_piece_by_piece(count, monkeypatch, relative_error):
    """Under forward-mode AD queries are taken a few at a time, with the same values and tangents as all at once."""
    q, k, v, *moves = (torch.randn(2, rows, 3, 64, dtype=torch.float64) for rows in (77, 130, 130) * 2)

    def run(scores: int) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(sys.modules["turbowan.ops.attention"], "_PLAIN_SCORES", scores)
        return torch.func.jvp(lambda *x: ops.attention(*x, count), (q, k, v), tuple(moves))

    for whole, pieces in zip(run(1 << 27), run(2 * 3 * 131 * 5), strict=True):
        assert relative_error(pieces, whole) < 1e-12
    step = 1e-5
    ahead, behind = (
        formula_with_count(*(x + sign * step * m for x, m in zip((q, k, v), moves, strict=True)), count)
        for sign in (1, -1)
    )
    assert relative_error(run(7)[1], (ahead - behind) / (2 * step)) < 1e-6


def formula_with_count(q, k, v, count):
    k, v = (torch.cat([x, x[:, -1:].expand(-1, count - 1, -1, -1)], dim=1) for x in (k, v))
    return formula(q, k, v)


@pytest.mark.parametrize("count", [0, -3])
def test_the_last_key_stands_for_one_at_least(count):
    with pytest.raises(RequestError, match=f"last_key_count must be 1 or more, got {count}"):
        ops.attention(*torch.randn(3, 1, 5, 2, 64), last_key_count=count)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((1, 5, 2, 64), (1, 7, 2, 64), (1, 6, 2, 64)),
        ((1, 5, 2, 64), (1, 7, 1, 64), (1, 7, 1, 64)),
        ((1, 5, 2, 64), (2, 7, 2, 64), (2, 7, 2, 64)),
        ((1, 5, 2, 64), (1, 7, 2, 32), (1, 7, 2, 32)),
        ((1, 5, 128), (1, 7, 128), (1, 7, 128)),
        ((1, 5, 2, 64), (1, 0, 2, 64), (1, 0, 2, 64)),
    ],
)
def test_shapes_that_do_not_go_together(q, k, v):
    with pytest.raises(RequestError, match=r"attention (takes q \[B, L, H, D\]|needs at least one key)"):
        ops.attention(*(torch.randn(shape) for shape in (q, k, v)))
