"""The loop on one process: what a step computes, and that a run's parts are the whole."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from torch import nn

from turbowan.errors import CheckpointError
from turbowan.train import checkpoint, curve
from turbowan.train.data import Batch
from turbowan.train.identity import RUN_FILE
from turbowan.train.trainer import TrainerConfig, mend_and_clip, run

CPU = torch.device("cpu")


class Line:
    """A straight line to be fitted: latents of row r at step s are known, the target is their sum."""

    negative = torch.zeros(1, 1, 1)

    def __init__(self) -> None:
        self.net = nn.Linear(6, 1)
        self.trained: dict[str, nn.Module] = {"student": self.net}
        self.frozen: dict[str, nn.Module] = {}
        self.seen: list[tuple[int, range]] = []

    def batch(self, step: int, rows: range) -> Batch:
        self.seen.append((step, rows))
        rows_of = [torch.randn(6, generator=torch.Generator().manual_seed(1000 * step + row)) for row in rows]
        return Batch(torch.stack(rows_of), torch.zeros(len(rows), 1, 1))

    def trains(self, step: int) -> str:
        return "student"

    def losses(self, batch: Batch, step: int, draws: object) -> dict[str, torch.Tensor]:
        return {"fit": (self.net(batch.latents) - batch.latents.sum(dim=1, keepdim=True)).square().mean()}


def settings(**changes) -> TrainerConfig:
    return TrainerConfig(**{"steps": 6, "batch": 4, "lr": {"student": 0.1}, "warmup": 3, "log_steps": 1, **changes})


def test_a_step_is_adamw_with_warm_up_and_the_average_is_the_papers(tmp_path, fresh_seed):
    ours, theirs = Line(), Line()
    theirs.net.load_state_dict(ours.net.state_dict())
    optimizer = torch.optim.AdamW(theirs.net.parameters(), betas=(0.5, 0.9), weight_decay=0.3)
    average = {}
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 * min(1.0, (step + 1) / 3)
        theirs.losses(theirs.batch(step, range(4)), step, None)["fit"].backward()
        nn.utils.clip_grad_norm_(theirs.net.parameters(), 0.7)
        optimizer.step()
        optimizer.zero_grad()
        decay = (1 - 1 / (step + 1)) ** (6.93720394 + 1)
        average = {k: decay * average.get(k, 0) + (1 - decay) * v for k, v in theirs.net.state_dict().items()}
    outcome = run(ours, ours, settings(betas=[0.5, 0.9], weight_decay=0.3, clip=0.7), tmp_path, CPU)
    assert (outcome.step, outcome.finished) == (6, True)
    for key, value in theirs.net.state_dict().items():
        assert torch.allclose(ours.net.state_dict()[key], value, atol=1e-6)
    kept = checkpoint.read(tmp_path / "step-00000006", "average.")
    assert kept.keys() == average.keys()
    assert all(torch.allclose(kept[key], value, atol=1e-6) for key, value in average.items())


def test_a_run_in_parts_is_the_whole_run(tmp_path, small_run, fresh_seed):
    common = ["--seed", str(fresh_seed % 1000), "--log-steps", "3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    small_run.main([str(whole), *common])
    stops = [small_run.main([str(parts), *common, "--max-minutes", "0"]) for _ in range(4)]
    assert [(stop.step, stop.finished) for stop in stops] == [(3, False), (6, False), (9, False), (12, True)]
    assert small_run.main([str(parts), *common]).step == 12  # a run that is done does nothing
    a, b = (checkpoint.read(folder / "step-00000012", "") for folder in (whole, parts))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a if key != "seconds")
    lines, others = (curve.read(folder / curve.CURVE_FILE) for folder in (whole, parts))
    assert [{**line, "seconds": 0} for line in lines] == [{**line, "seconds": 0} for line in others]
    assert {"tangent", "twice", "norm_student", "critic", "norm_critic", "nonfinite"} < lines[-1].keys()
    assert [path.name for path in checkpoint.saved(parts)] == ["step-00000009", "step-00000012"]
    assert (parts / curve.PICTURE_FILE).exists()


def test_lines_after_the_state_are_made_again(tmp_path):
    """As a kill between two saves leaves it."""
    method = Line()
    run(method, method, settings(steps=3), tmp_path, CPU)
    with (tmp_path / curve.CURVE_FILE).open("a") as file:
        file.write('{"step": 4, "fit": 17.0}\n{"step": 5, "fi')
    run(method, method, settings(steps=5), tmp_path, CPU)
    lines = curve.read(tmp_path / curve.CURVE_FILE)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line["fit"] < 17 for line in lines)


def test_parts_of_a_batch_add_up_to_it(tmp_path, fresh_seed):
    one, four = Line(), Line()
    four.net.load_state_dict(one.net.state_dict())
    run(one, one, settings(), tmp_path / "one", CPU)
    run(four, four, settings(accumulate=4), tmp_path / "four", CPU)
    assert four.seen[:5] == [(0, range(i, i + 1)) for i in range(4)] + [(1, range(1))]
    assert torch.allclose(one.net.weight, four.net.weight, atol=1e-6)
    lines = [curve.read(tmp_path / name / curve.CURVE_FILE) for name in ("one", "four")]
    assert [line["fit"] for line in lines[0]] == pytest.approx([line["fit"] for line in lines[1]], rel=1e-5)


def test_gradients_that_are_no_numbers_count_as_zero():
    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    weights[0].grad = torch.tensor([math.nan, 3.0, math.inf])
    weights[1].grad = torch.tensor([-math.inf, 4.0])
    norm, nonfinite = mend_and_clip(weights, 0.5)
    assert (float(norm), float(nonfinite)) == (5.0, 1.0)
    assert torch.allclose(weights[0].grad, torch.tensor([0.0, 0.3, 0.0]), atol=1e-6)
    assert torch.allclose(weights[1].grad, torch.tensor([0.0, 0.4]), atol=1e-6)
    assert weights[2].grad is None
    norm, nonfinite = mend_and_clip(weights, 0.0)
    assert (float(norm), float(nonfinite)) == (pytest.approx(0.5), 0.0)
    assert torch.allclose(weights[1].grad, torch.tensor([0.0, 0.4]), atol=1e-6)
    weights[0].grad[1] = math.inf
    norm, nonfinite = mend_and_clip(weights, 0.0)
    assert (norm.isfinite(), float(nonfinite), weights[0].grad.tolist()) == (False, 1.0, [0.0, 0.0, 0.0])


def test_the_norm_is_worked_out_once_unless_gradients_are_clipped(monkeypatch):
    """It reads every gradient, and under torchrun all processes wait for it."""
    calls: list[int] = []
    real = nn.utils.get_total_norm
    monkeypatch.setattr(nn.utils, "get_total_norm", lambda gradients: calls.append(1) or real(gradients))
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    mend_and_clip([weight], 0.0)
    assert len(calls) == 1


def test_a_loss_that_is_no_number_is_seen_and_does_no_harm(tmp_path):
    method = Line()
    fine = method.losses
    method.losses = lambda batch, step, draws: {k: v / (step - 2) for k, v in fine(batch, step, draws).items()}
    run(method, method, settings(weight_decay=0.0), tmp_path, CPU)
    lines = curve.read(tmp_path / curve.CURVE_FILE)
    assert [line["nonfinite"] for line in lines] == [0, 0, 1, 0, 0, 0]
    assert lines[2]["fit"] is None
    assert method.net.weight.isfinite().all()


def test_another_runs_folder_is_one_line(tmp_path):
    method = Line()
    run(method, method, settings(), tmp_path, CPU)
    other = Line()
    other.net = nn.Linear(6, 2)
    other.trained = {"student": other.net}
    with pytest.raises(CheckpointError, match=r"step-00000006 is not a state of this run") as error:
        run(other, other, settings(steps=8), tmp_path, CPU)
    assert "\n" not in str(error.value)


FACTS = {"teacher": "wan.pth", "rcm": {"guidance_scale": 5.0, "blocks": ((64, 64),), "boundary": None}}


@pytest.mark.parametrize(
    ("changes", "facts", "said"),
    [
        ({"seed": 3}, FACTS, "seed is 0, now 3"),
        ({"batch": 8}, FACTS, "batch is 4, now 8"),
        ({"batch": 8, "seed": 1}, FACTS, "seed is 0, now 1; batch is 4, now 8"),
        ({}, {**FACTS, "teacher": "other.pth"}, "teacher is wan.pth, now other.pth"),
        ({}, {**FACTS, "rcm": {**FACTS["rcm"], "boundary": 0.9}}, "rcm.boundary is None, now 0.9"),
        ({}, {**FACTS, "rcm": {**FACTS["rcm"], "blocks": [[64, 128]]}}, "rcm.blocks is [[64, 64]], now [[64, 128]]"),
    ],
)
def test_another_run_does_not_go_on_in_a_folder(tmp_path, changes, facts, said):
    method = Line()
    run(method, method, settings(steps=2), tmp_path, CPU, facts=FACTS)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as error:
        run(method, method, settings(**changes), tmp_path, CPU, facts=facts)
    assert str(error.value).startswith(f"{tmp_path} holds another run ({said}); go on with its settings")
    assert "\n" not in str(error.value)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_same_run_goes_on_whatever_its_length_and_habits(tmp_path):
    method = Line()
    run(method, method, settings(steps=2), tmp_path, CPU, facts=FACTS)
    longer = settings(steps=4, log_steps=2, save_minutes=1, accumulate=2)
    more = {**FACTS, "rcm": {**FACTS["rcm"], "of_a_later_version": 1}}
    assert run(method, method, longer, tmp_path, CPU, 5.0, more).step == 4
    (tmp_path / RUN_FILE).write_text("half")
    with pytest.raises(CheckpointError, match=r"run\.json cannot be read .*; remove it to go on unchecked"):
        run(method, method, longer, tmp_path, CPU)
    (tmp_path / RUN_FILE).unlink()  # as of a run before there was one
    assert run(method, method, settings(steps=5), tmp_path, CPU).finished


def test_a_folder_without_states_is_free(tmp_path):
    """A run that was stopped before its first state is no reason to refuse another."""
    (tmp_path / RUN_FILE).write_text('{"seed": 99, "batch": 1}')
    method = Line()
    assert run(method, method, settings(), tmp_path, CPU).finished
    assert json.loads((tmp_path / RUN_FILE).read_text()) == {"seed": 0, "batch": 4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": {"critic": 0.1}}, "lr needs a rate for each trained net: student; it names critic"),
        ({"lr": {}}, "it names nothing"),
        ({"batch": 0}, "batch must be a positive number, got 0"),
        ({"activation_checkpointing": "all"}, "must be one of none, mm_only, block, got 'all'"),
        ({"ema": 0.5}, "ema, the average's width, must be 0 (none) or below 0.28, got 0.5"),
    ],
)
def test_settings_that_cannot_be_are_one_line(tmp_path, changes, said):
    method = Line()
    with pytest.raises(CheckpointError) as error:
        run(method, method, settings(**changes), tmp_path, CPU)
    assert said in str(error.value)


def test_the_loop_waits_for_the_device_at_lines_only(tmp_path, monkeypatch):
    """Only a line of the curve reads a tensor's value: on a GPU that waits for all work before it. AdamW may, on a CPU,
    where its counts lie in plain memory."""
    reads: list[int] = []
    method = Line()

    def watched(name: str) -> None:
        real = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor) -> object:
            if "/torch/optim/" not in sys._getframe(1).f_code.co_filename:
                reads.append(method.seen[-1][0])
            return real(tensor)

        monkeypatch.setattr(torch.Tensor, name, read)

    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        watched(name)
    run(method, method, settings(steps=12, log_steps=4, clip=1.0), tmp_path, CPU)
    assert set(reads) == {3, 7, 11}
