"""Rotary embedding against complex rotation in float64, and the split of a head among time, height and width."""

import pytest
import torch

from turbowan import ops

pytestmark = pytest.mark.usefixtures("fresh_seed")


def angles(frames, height, width, size):
    """Angle of every pair of every token, from the written definition: [L, D / 2], token by token."""
    sixth = size // 6
    dims = (size - 4 * sixth, 2 * sixth, 2 * sixth)
    rows = []
    for t in range(frames):
        for h in range(height):
            for w in range(width):
                rows.append(
                    [
                        position * 10000.0 ** (-2 * i / dim)
                        for position, dim in zip((t, h, w), dims, strict=True)
                        for i in range(dim // 2)
                    ]
                )
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("grid", "size"), [((1, 1, 1), 128), ((3, 2, 5), 128), ((2, 4, 3), 64), ((21, 3, 2), 128)])
def test_table_is_time_height_width(grid, size):
    cos, sin = ops.rope_table(*grid, head_size=size)
    expected = angles(*grid, size)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == expected.shape
    assert (cos.double() - expected.cos()).abs().max() < 1e-5
    assert (sin.double() - expected.sin()).abs().max() < 1e-5


def test_a_head_of_128_has_22_pairs_of_time():
    cos, sin = ops.rope_table(2, 2, 2, 128)
    assert ((cos[0] == 1) & (sin[0] == 0)).all()
    moved = [(sin[token] != 0).nonzero().flatten().tolist() for token in (4, 2, 1)]  # one step in t, h, w
    assert moved == [list(range(22)), list(range(22, 43)), list(range(43, 64))]


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_rotates_adjacent_pairs(dtype, bar, relative_error):
    x = torch.randn(2, 30, 3, 128, dtype=dtype)
    ours = ops.rope(x, *ops.rope_table(3, 2, 5, 128))
    assert ours.dtype == dtype
    turn = torch.polar(torch.ones(30, 64, dtype=torch.float64), angles(3, 2, 5, 128))[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    assert relative_error(ours, torch.view_as_real(pairs * turn).flatten(-2)) <= bar


def test_products_depend_on_the_distance_only():
    """What rotary embedding is for: q at t, k at t + 2 give the same product wherever t is."""
    q, k = torch.randn(1, 1, 1, 128), torch.randn(1, 1, 1, 128)
    table = ops.rope_table(9, 1, 1, 128)
    q, k = (ops.rope(x.expand(-1, 9, -1, -1).contiguous(), *table)[0, :, 0] for x in (q, k))
    products = (q[:-2] * k[2:]).sum(dim=-1)
    assert torch.allclose(products, products[:1].expand(7), atol=1e-4)
