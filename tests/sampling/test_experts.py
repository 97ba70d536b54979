"""Which expert a step belongs to."""

import pytest

from turbowan.sampling import rcm
from turbowan.sampling.experts import expert_for, switch_step


@pytest.mark.parametrize(("t", "expert"), [(1.0, "high"), (0.9, "high"), (0.9 - 1e-12, "low"), (0.0, "low")])
def test_high_noise_from_the_boundary_up(t, expert):
    assert expert_for(t, 0.9) == expert


@pytest.mark.parametrize(("steps", "experts"), [(1, "h"), (2, "hh"), (3, "hhl"), (4, "hhll")])
def test_steps_of_the_rcm_grid(steps, experts):
    """One or two steps never reach the low-noise expert at Wan 2.2's boundary."""
    times = rcm.timesteps(steps, 200.0)[:-1].tolist()
    assert "".join(expert_for(t, 0.9)[0] for t in times) == experts


@pytest.mark.parametrize(("steps", "switch"), [(1, 1), (2, 2), (3, 2), (4, 2)])
def test_the_step_of_the_switch(steps, switch):
    assert switch_step(rcm.timesteps(steps, 200.0).tolist(), 0.9) == switch
    assert switch_step(rcm.timesteps(steps, 200.0).tolist(), 1.0) == 0
    assert switch_step(rcm.timesteps(steps, 200.0).tolist(), 0.0) == steps
