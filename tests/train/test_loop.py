"""The clock, the schedule, the average, and a state that goes on where a killed run stopped."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
import torch
from torch import nn

from turbowan.errors import CheckpointError
from turbowan.train.curve import CURVE_FILE
from turbowan.train.ema import ExponentialAverage
from turbowan.train.loop import STATE_FILE, Schedule, Stage, clip_and_step

CPU = torch.device("cpu")


def test_the_rate_rises_then_falls_along_a_cosine():
    schedule = Schedule(peak=2.0, warmup=0.1, final=0.05)
    rates = [schedule.at(i / 1000) for i in range(1001)]
    assert rates[50] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(2.0)
    assert rates[1000] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[100:]))
    assert schedule.at(0.55) == pytest.approx(2.0 * (0.05 + 0.95 / 2))


def test_the_average_is_the_one_it_says():
    layer = nn.Linear(3, 2)
    average = ExponentialAverage(layer, 0.9)
    expected = layer.weight.detach().clone()
    for step in range(200):
        with torch.no_grad():
            layer.weight.normal_()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
        average.update(step)
    last = layer.weight.detach().clone()
    average.swap()
    assert torch.allclose(layer.weight, expected, atol=1e-6)
    average.swap()
    assert torch.equal(layer.weight, last)


def train(folder, steps: int, minutes: float = 60.0) -> tuple[list[torch.Tensor], Stage]:
    """A stage of a small regression that stops, as a killed one would, after so many steps in all."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    average = ExponentialAverage(layer, 0.9)
    stage = Stage(folder, minutes, None, {"layer": layer, "optimizer": optimizer, "average": average}, CPU)
    while stage.running and stage.step < steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(stage.step))
        loss = (layer(x) - x.sum(dim=1, keepdim=True)).square().mean()
        loss.backward()
        clip_and_step([optimizer], list(layer.parameters()), 0.1, 1.0)
        average.update(stage.step)
        stage.step += 1
    stage.save()
    return [*layer.parameters(), *average.values], stage


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    whole, _ = train(tmp_path / "whole", 30)
    train(tmp_path / "parts", 11)
    train(tmp_path / "parts", 12)
    parts, stage = train(tmp_path / "parts", 30)
    assert stage.step == 30
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_what_a_killed_run_did_not_save_is_made_again(tmp_path):
    """Killed at step 17 with the state of step 11 on the disk."""
    whole, _ = train(tmp_path / "whole", 30)
    train(tmp_path / "killed", 11)
    kept = (tmp_path / "killed" / STATE_FILE).read_bytes()
    train(tmp_path / "killed", 17)
    (tmp_path / "killed" / STATE_FILE).write_bytes(kept)
    again, _ = train(tmp_path / "killed", 30)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_time_counts_over_runs_and_ends_the_stage(tmp_path):
    def run(minutes: float, limit: float | None) -> Stage:
        stage = Stage(tmp_path, minutes, limit, {}, CPU)
        while stage.running:
            time.sleep(0.01)
            stage.step += 1
        stage.save()
        return stage

    first = run(0.3 / 60, 0.1 / 60)
    assert 0.1 <= first.trained < 0.3
    second = run(0.3 / 60, None)
    assert second.step > first.step
    assert second.progress == 1.0
    assert run(0.3 / 60, None).step == second.step  # a stage that is done does nothing


def test_a_kill_while_saving_leaves_the_state_before(tmp_path, monkeypatch):
    _, stage = train(tmp_path, 5)

    def dies(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        stage.save()
    monkeypatch.undo()
    assert train(tmp_path, 6)[1].step == 6


def test_a_state_of_something_else_is_one_line(tmp_path):
    torch.save({"trained": 1.0, "step": 3}, tmp_path / STATE_FILE)
    with pytest.raises(CheckpointError, match="is not a state of this stage") as error:
        train(tmp_path, 5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["cut", "sizes", "empty", "text"])
def test_a_damaged_state_is_one_line(tmp_path, kind):
    train(tmp_path, 5)
    path = tmp_path / STATE_FILE
    if kind == "sizes":
        state = torch.load(path, weights_only=True)
        torch.save({**state, "layer": nn.Linear(4, 3).state_dict()}, path)
    else:
        path.write_bytes({"cut": path.read_bytes()[:300], "empty": b"", "text": b"not a state"}[kind])
    with pytest.raises(CheckpointError, match="is not a state of this stage") as error:
        train(tmp_path, 6)
    assert "\n" not in str(error.value)


def test_a_step_clips_and_scales_the_rate():
    weights = [nn.Parameter(torch.randn(6)) for _ in range(2)]
    before = [w.detach().clone() for w in weights]
    optimizer = torch.optim.SGD([{"params": [weights[0]]}, {"params": [weights[1]], "scale": 0.25}], lr=1.0)
    for weight in weights:
        weight.grad = torch.full_like(weight, 3.0)
    assert float(clip_and_step([optimizer], weights, 0.5, 1.0)) == pytest.approx(3 * 12**0.5)
    for weight, old, scale in zip(weights, before, (1.0, 0.25), strict=True):
        assert torch.allclose(old - weight.detach(), torch.full((6,), 0.5 * scale / 12**0.5), atol=1e-5)
        assert weight.grad is None


def test_the_curve_is_lines_of_json(tmp_path, capsys):
    stage = Stage(tmp_path, 1.0, None, {}, CPU)
    stage.log(loss=0.25)
    stage.step = 7
    stage.log(loss=0.125)
    lines = [json.loads(line) for line in (tmp_path / CURVE_FILE).read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 0.25), (7, 0.125)]
    assert "loss 0.125" in capsys.readouterr().out
