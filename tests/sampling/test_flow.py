"""The many-step samplers: exact cases, orders of convergence, and diffusers' schedulers on the same grid."""

import math

import numpy as np
import pytest
import torch

from turbowan.errors import RequestError
from turbowan.sampling import flow

pytestmark = pytest.mark.usefixtures("fresh_seed")


def velocity(x, t, step=0):
    """A smooth field that depends on the state and the time."""
    return torch.sin(2 * x) * t + 0.3 * x - 0.5


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
def test_grid_is_even_then_shifted(steps, shift):
    times = flow.timesteps(steps, shift)
    expected = [0.999 * (steps - i) / steps for i in range(steps + 1)]
    expected = [shift * t / (1 + (shift - 1) * t) for t in expected]
    assert times.dtype == torch.float64
    assert times.tolist() == pytest.approx(expected, rel=1e-12)
    assert times[-1] == 0


@pytest.mark.parametrize(
    ("steps", "shift", "line"),
    [
        (0, 5.0, "at least 1, got 0"),
        (10, 0.0, "shift must be positive, got 0.0"),
        (10, math.nan, "shift must be positive, got nan"),
        (10, math.inf, "shift must be positive, got inf"),
    ],
)
def test_grid_refuses(steps, shift, line):
    with pytest.raises(RequestError, match=line):
        flow.timesteps(steps, shift)


@pytest.mark.parametrize("solver", flow.SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_straight_field_is_followed_exactly(solver, steps):
    """Velocity e - x0, the same along the whole path from the first time's mixture."""
    times = flow.timesteps(steps, 5.0)
    data, noise = torch.randn(100).double(), torch.randn(100).double()
    start = (1 - times[0]) * data + times[0] * noise
    ours = flow.sample(lambda x, t, i: noise - data, start, times, solver)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours.double(), data, atol=1e-6)


def gaussian_error(solver, steps):
    """Data N(2, 0.5^2): the exact path is x_t = 2 (1 - t) + z sqrt((0.5 (1 - t))^2 + t^2)."""
    times = flow.timesteps(steps, 1.0)

    def spread(t):
        return math.sqrt((0.5 * (1 - t)) ** 2 + t**2)

    def exact_velocity(x, t, i):
        slope = (t - 0.25 * (1 - t)) / spread(t) ** 2
        return slope * (x - 2 * (1 - t)) - 2

    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    first = times[0].item()
    out = flow.sample(exact_velocity, 2 * (1 - first) + z * spread(first), times, solver)
    return (out.double() - (2 + 0.5 * z)).abs().max().item()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("unipc", 2)])
def test_order_of_convergence(solver, order):
    coarse, fine = gaussian_error(solver, 20), gaussian_error(solver, 80)
    assert math.log(coarse / fine, 4) > order - 0.2
    assert gaussian_error("unipc", 20) < 0.2 * gaussian_error("euler", 20)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
def test_unipc_is_diffusers(steps, shift, relative_error):
    """On our grid, which is that of Wan's own code; diffusers' starts a little closer to 1."""
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    peer.set_timesteps(steps)
    times = flow.timesteps(steps, shift)
    peer.sigmas = times.float()
    noise = torch.randn(4, 9)
    x = noise.double()
    for i, timestep in enumerate(peer.timesteps):
        x = peer.step(velocity(x, times[i].item()), timestep, x).prev_sample
    assert relative_error(flow.sample(velocity, noise, times, "unipc"), x) <= 1e-4


@pytest.mark.parametrize("solver", flow.SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_grid_may_start_at_pure_noise(solver, steps):
    """At t = 1 the signal is nothing and its logarithm infinite; the limit from below is approached slowly."""
    times, noise = torch.linspace(1, 0, steps + 1, dtype=torch.float64), torch.randn(20)
    ours = flow.sample(velocity, noise, times, solver)
    times[0] -= 1e-15
    assert ours.isfinite().all()
    assert torch.allclose(ours, flow.sample(velocity, noise, times, solver), atol=5e-3)


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_euler_is_diffusers(steps, shift, relative_error):
    diffusers = pytest.importorskip("diffusers")
    times = flow.timesteps(steps, shift)
    peer = diffusers.FlowMatchEulerDiscreteScheduler()
    peer.set_timesteps(sigmas=np.array(times[:-1]))
    assert times.tolist() == pytest.approx(peer.sigmas.tolist(), abs=1e-6)
    noise = torch.randn(4, 9)
    x = noise.double()
    for i, timestep in enumerate(peer.timesteps):
        x = peer.step(velocity(x, times[i].item()), timestep, x).prev_sample
    assert relative_error(flow.sample(velocity, noise, times, "euler"), x) <= 1e-4


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_state_is_float64_and_one_evaluation_a_step(solver):
    seen, reported = [], []

    def watched(x, t, step):
        seen.append((x.dtype, t, step))
        return velocity(x, t).float()

    times, noise = flow.timesteps(6, 5.0), torch.randn(2, 2)
    before = noise.clone()
    out = flow.sample(watched, noise, times, solver, on_step=lambda *step: reported.append(step))
    assert seen == [(torch.float64, t, i) for i, t in enumerate(times[:-1].tolist())]
    assert [(i, t) for i, _, t in reported] == list(enumerate(times[1:].tolist()))
    assert torch.equal(reported[-1][1].float(), out)
    assert torch.equal(noise, before)


def test_refuses_an_unknown_solver():
    with pytest.raises(RequestError, match="sampler must be one of rcm, euler, unipc, got 'heun'"):
        flow.sample(velocity, torch.randn(2), flow.timesteps(2, 1.0), "heun")
