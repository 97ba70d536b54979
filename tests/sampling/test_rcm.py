"""The rCM sampler: its grid, both updates against the written formulas, and the recorded run of the official code."""

import math

import pytest
import torch

from turbowan.checkpoints import load_transformer
from turbowan.errors import RequestError
from turbowan.sampling import rcm

pytestmark = pytest.mark.usefixtures("fresh_seed")


def grid(steps, sigma_max):
    """t = tan(tau) / (1 + tan(tau)) over the TrigFlow angles."""
    first = [sigma_max / (1 + sigma_max)]
    middle = [math.sin(a) / (math.cos(a) + math.sin(a)) for a in (1.5, 1.4, 1.0)[: steps - 1]]
    return [*first, *middle, 0.0]


def velocity(x, t, step):
    """Some field that depends on the state, the time and the step."""
    return torch.sin(3 * x) * t + 0.2 * x - 0.1 * step


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("sigma_max", [15.0, 80.0, 200.0, 1600.0])
def test_grid(steps, sigma_max):
    times = rcm.timesteps(steps, sigma_max)
    assert times.dtype == torch.float64
    assert times.tolist() == pytest.approx(grid(steps, sigma_max), rel=1e-14, abs=0)
    assert times[-1] == 0
    assert (times[:-1] > times[1:]).all()


def test_recorded_grid(recorded):
    (expected,) = recorded("t2v-tiny.io.safetensors", "sampler.t")
    assert (rcm.timesteps(4, 80.0) - expected).abs().max() < 1e-15


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stochastic_update(steps, dtype):
    """x0 = x - t v, then x = (1 - t') x0 + t' noise, with nothing but the noise in less than float64."""
    noises = [torch.randn(2, 3, dtype=dtype) for _ in range(steps + 1)]
    times, states = grid(steps, 80.0), []
    ours = rcm.sample(velocity, noises, rcm.timesteps(steps, 80.0), on_step=lambda i, x, t: states.append(x))
    x = noises[0].double() * times[0]
    for i in range(steps):
        clean = x - times[i] * velocity(x, times[i], i)
        x = (1 - times[i + 1]) * clean + times[i + 1] * noises[i + 1].double()
        assert torch.allclose(states[i], x, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6)
    assert torch.equal(ours, states[-1].float())


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_deterministic_update(steps):
    """x moves along v by t - t'; only the first noise is used."""
    noise = torch.randn(2, 3)
    times = grid(steps, 200.0)
    states = []
    rcm.sample(velocity, [noise], rcm.timesteps(steps, 200.0), True, on_step=lambda i, x, t: states.append(x))
    x = noise.double() * times[0]
    for i in range(steps):
        x = x - (times[i] - times[i + 1]) * velocity(x, times[i], i)
        assert torch.allclose(states[i], x, rtol=0, atol=1e-12)


def test_both_forms_agree_in_one_step():
    noise, times = torch.randn(4), rcm.timesteps(1, 80.0)
    assert torch.equal(rcm.sample(velocity, [noise], times), rcm.sample(velocity, [noise], times, ode=True))


@pytest.mark.parametrize("ode", [False, True])
def test_a_straight_field_gives_its_data(ode):
    """Velocity e - x0 everywhere: whatever the noise, the end is x0 (the start carries t0 times the noise)."""
    noises, data = [torch.randn(50) for _ in range(4)], torch.randn(50).double()
    ours = rcm.sample(lambda x, t, i: (x - data) / t, noises, rcm.timesteps(4, 80.0), ode)
    assert torch.allclose(ours.double(), data, atol=1e-6)


def test_the_last_noise_may_be_missing():
    noises, times = [torch.randn(5) for _ in range(5)], rcm.timesteps(4, 80.0)
    whole = rcm.sample(velocity, noises, times)
    assert torch.equal(rcm.sample(velocity, noises[:4], times), whole)
    noises[4] = noises[4] * 1e9
    assert torch.equal(rcm.sample(velocity, noises, times), whole)
    with pytest.raises(RequestError, match="4 SDE steps need at least 4 noise tensors, got 3"):
        rcm.sample(velocity, noises[:3], times)
    with pytest.raises(RequestError, match="at least"):
        rcm.sample(velocity, [], times, ode=True)


@pytest.mark.parametrize("ode", [False, True])
def test_state_is_float64_and_every_step_is_reported(ode):
    seen, reported = [], []

    def watched(x, t, step):
        seen.append((x.dtype, t, step))
        return velocity(x, t, step).float()

    times = rcm.timesteps(3, 80.0)
    noises = [torch.randn(2, 2) for _ in range(3)]
    before = [noise.clone() for noise in noises]
    out = rcm.sample(watched, noises, times, ode, on_step=lambda *step: reported.append(step))
    assert seen == [(torch.float64, t, i) for i, t in enumerate(times[:-1].tolist())]
    assert [(i, t) for i, _, t in reported] == list(enumerate(times[1:].tolist()))
    assert {x.dtype for _, x, _ in reported} == {torch.float64}
    assert torch.equal(reported[-1][1].float(), out)
    assert all(torch.equal(a, b) for a, b in zip(before, noises, strict=True))


@pytest.mark.parametrize(
    ("steps", "sigma_max", "line"),
    [
        (0, 80.0, "1 to 4 steps, got 0"),
        (5, 80.0, "1 to 4 steps, got 5"),
        (4, 0.0, "sigma_max must be positive, got 0.0"),
        (4, math.nan, "sigma_max must be positive, got nan"),
        (2, 14.0, "sigma_max must exceed 14.1 for 2 steps, got 14.0"),
    ],
)
def test_refusals(steps, sigma_max, line):
    with pytest.raises(RequestError, match=line):
        rcm.timesteps(steps, sigma_max)


def test_recorded_run(golden, recorded, relative_error):
    """Four stochastic steps with SLA; the net gets the latent and 1000 t rounded to bfloat16, as there."""
    states = [f"sampler.sde.x{i}" for i in range(4)]
    noises = [f"sampler.noise{i}" for i in range(5)]
    context, *tensors = recorded("t2v-tiny.io.safetensors", "context", *states, *noises)
    expected, noises = tensors[:4], tensors[4:]
    net = load_transformer(golden("t2v-tiny.pth"), attention="sla", sla_topk=0.25, norms="official")
    ours = []

    def rounded(x, t, step):
        timestep = (torch.tensor(t, dtype=torch.float32) * 1000).bfloat16().float()
        return net(x.bfloat16().float(), timestep.view(1), context.float())

    final = rcm.sample(rounded, noises, rcm.timesteps(4, 80.0), on_step=lambda i, x, t: ours.append(x))
    for x, reference in zip(ours, expected, strict=True):
        assert relative_error(x, reference) <= 0.012
    assert relative_error(final, expected[-1]) <= 0.012


@pytest.mark.parametrize("ode", [False, True])
def test_a_run_in_two_parts_is_the_run(ode, fresh_seed):
    """As two experts take it: the second part starts from the latent that the first one came to."""
    times, noises = rcm.timesteps(4, 200.0), [torch.randn(2, 3) for _ in range(4)]
    reached = []

    def velocity(x, t, step):
        return x.sin() * t

    whole = rcm.sample(velocity, noises, times, ode)
    rcm.sample(velocity, noises, times[:3], ode, on_step=lambda i, x, t: reached.append(x))
    assert torch.equal(rcm.sample(velocity, noises[2:], times[2:], ode, start=reached[-1]), whole)


def test_inputs_are_rounded_to_bf16_and_stay_float32(fresh_seed):
    inputs = torch.randn(50, dtype=torch.float64), torch.rand(50) * 1000, torch.randn(20)
    for given, rounded in zip(inputs, rcm.round_inputs(*inputs), strict=True):
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, given.float().bfloat16().float())
        assert not torch.equal(rounded, given.float())
    assert rcm.round_inputs(*inputs[:2])[2] is None
