"""Random numbers by step and row: the same whoever draws them, and no two rows' alike."""

from __future__ import annotations

import torch

from turbowan.train.data import Draws, stream

CPU = torch.device("cpu")


def test_a_row_draws_the_same_whoever_holds_it(fresh_seed: int) -> None:
    whole, part = Draws(fresh_seed, 7, range(6), CPU), Draws(fresh_seed, 7, range(2, 5), CPU)
    assert torch.equal(whole.normal(3, 2)[2:5], part.normal(3, 2))
    assert torch.equal(whole.uniform()[2:5], part.uniform())


def test_no_two_rows_of_a_run_share_a_stream(fresh_seed: int) -> None:
    """On a CPU too, whose generators take the low 32 bits of a seed: by birthdays, hashes of 100,000 rows would give
    a pair the same."""
    rows = [(step, row) for step in range(0, 2**20, 2**12) for row in (*range(100), 4095)]
    rows += [(step, row) for step in range(65_536, 65_536 + 750) for row in range(100)]
    seeds = [stream(fresh_seed, step, row) for step, row in rows]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) == len(set(rows)) > 100_000
    assert len({seed >> 32 for seed in seeds}) > 0.99 * len(seeds)  # what a GPU takes besides


def test_runs_steps_and_rows_have_streams_of_their_own(fresh_seed: int) -> None:
    """Neighbours, and what counts in steps of 2**16 or 2**32, where seeds made by arithmetic come round again."""
    near = [(fresh_seed + a, b, c) for a in (0, 1, 2**32) for b in (0, 1, 2**16, 2**17) for c in (0, 1, 63)]
    drawn = [Draws(seed, step, range(row, row + 1), CPU).normal(8)[0] for seed, step, row in near]
    assert len({tuple(values.tolist()) for values in drawn}) == len(near)


def test_the_numbers_are_as_they_should_be(fresh_seed: int) -> None:
    """First numbers of many streams, over rows and over steps: spread evenly, and none follows from the one before."""
    rows = Draws(fresh_seed, 0, range(4000), CPU).uniform()
    steps = torch.cat([Draws(fresh_seed, step, range(3, 4), CPU).uniform() for step in range(4000)])
    for values in (rows, steps):
        counts = torch.histc(values, 20, 0, 1)
        assert float(((counts - 200) ** 2 / 200).sum()) < 60  # 19 degrees of freedom: one in 200,000 exceeds it
        assert abs(float(torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1])) < 0.08
