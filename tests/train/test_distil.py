"""The distillation stages from files to files: what they start from, what they write, and that they go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from turbowan.checkpoints import load_transformer
from turbowan.checkpoints.files import write_tensors
from turbowan.checkpoints.official import write_transformer
from turbowan.errors import CheckpointError
from turbowan.models.transformer import TransformerConfig, WanTransformer
from turbowan.train import checkpoint
from turbowan.train.data import Batch, Draws
from turbowan.train.distil import train_rcm, train_sla
from turbowan.train.rcm import RCMConfig
from turbowan.train.sla import SLAConfig
from turbowan.train.trainer import TrainerConfig

pytestmark = pytest.mark.usefixtures("fresh_seed")

CPU = torch.device("cpu")
SIZES = TransformerConfig(dim=128, ffn_dim=96, num_layers=1, text_dim=24)
RATES = {"student": 1e-3, "critic": 1e-3}
RCM = RCMConfig(guidance_scale=2.0, student_every=2, simulation_times="sampler", sigma_max=200.0, top_k=0.5)


class Latents:
    """Row r of step s is always the same; with a condition for image-to-video."""

    negative, text_dim = torch.zeros(1, 3, 24), 24

    def __init__(self, image: bool = False) -> None:
        self.condition_channels = 20 if image else 0

    def batch(self, step: int, rows: range) -> Batch:
        draws = Draws(3, step, rows, CPU)
        condition = draws.normal(20, 2, 6, 8) if self.condition_channels else None
        return Batch(draws.normal(16, 2, 6, 8), draws.normal(5, 24), condition)


def settings(steps: int = 4, **changes: object) -> TrainerConfig:
    return TrainerConfig(**{"steps": steps, "batch": 2, "lr": RATES, "warmup": 1, "log_steps": 2, **changes})


def file_of(path: Path, **sizes: object) -> Path:
    """A transformer's file with random weights."""
    state = {k: v.bfloat16() for k, v in WanTransformer(replace(SIZES, **sizes)).state_dict().items()}
    write_tensors(path, write_transformer(state))
    return path


def assert_holds(path: Path, folder: Path, which: str) -> None:
    """The file's weights are those of the run's last state, in bfloat16."""
    state = checkpoint.read(checkpoint.saved(folder)[-1], which)
    net = load_transformer(path).state_dict()
    assert net.keys() == state.keys()
    assert all(torch.equal(value, state[key].bfloat16().float()) for key, value in net.items())


def moved(path: Path, other: Path) -> float:
    """How far the weights that both files have lie apart, on average."""
    ours, theirs = (load_transformer(each).state_dict() for each in (path, other))
    return max(float((ours[key] - theirs[key]).abs().mean()) for key in ours.keys() & theirs.keys())


def test_sla_then_rcm(tmp_path: Path) -> None:
    """A teacher's file becomes one with SLA, in two runs, and that one a student of few steps that keeps it."""
    teacher, folder = file_of(tmp_path / "teacher.safetensors"), tmp_path / "sla"
    given = SLAConfig(top_k=0.5, blocks=[[8, 8]]), settings(lr={"student": 1e-3}), teacher, Latents(), folder, CPU
    assert train_sla(*given, max_minutes=0) == []
    assert [path.name for path in checkpoint.saved(folder)] == ["step-00000002"]
    (aligned,) = train_sla(*given)
    assert aligned == folder / "transformer.safetensors"
    assert_holds(aligned, folder, "average.")
    assert load_transformer(aligned).config == replace(SIZES, has_sla=True)
    assert load_transformer(aligned).blocks[0].self_attn.proj_l.weight.any()
    assert moved(aligned, teacher) > 1e-5

    (student,) = train_rcm(RCM, settings(), teacher, Latents(), tmp_path / "rcm", CPU, start=aligned)
    assert_holds(student, tmp_path / "rcm", "average.")
    assert load_transformer(student).config.has_sla
    assert 1e-5 < moved(student, aligned) < moved(student, file_of(tmp_path / "another.safetensors"))
    saved = checkpoint.read(checkpoint.saved(tmp_path / "rcm")[-1], "model.")
    assert {key.split(".")[0] for key in saved} == {"student", "critic"}


def test_rcm_alone(tmp_path: Path) -> None:
    """The student has the teacher's attention unless it is given SLA; without an average the file is the student's."""
    teacher = file_of(tmp_path / "teacher.pth")
    (student,) = train_rcm(RCM, settings(2, ema=0.0), teacher, Latents(), tmp_path / "dense", CPU)
    assert_holds(student, tmp_path / "dense", "model.student.")
    assert not load_transformer(student).config.has_sla
    (student,) = train_rcm(replace(RCM, sla=True), settings(2), teacher, Latents(), tmp_path / "sla", CPU)
    assert load_transformer(student).config.has_sla


def test_two_experts(tmp_path: Path) -> None:
    """Equal at the start, each trained on its own noise, each in its own file."""
    teacher, how = file_of(tmp_path / "teacher.safetensors", in_dim=36), replace(RCM, boundary=0.9, sla=True)
    high, low = train_rcm(how, settings(6), teacher, Latents(image=True), tmp_path / "run", CPU)
    assert [path.name for path in (high, low)] == ["high_noise.safetensors", "low_noise.safetensors"]
    for path, name in ((high, "high"), (low, "low")):
        assert_holds(path, tmp_path / "run", f"average.{name}.")
        assert load_transformer(path).config == replace(SIZES, in_dim=36, has_sla=True)
        assert moved(path, teacher) > 1e-5
    assert moved(high, low) > 1e-5
    updates = checkpoint.read(checkpoint.saved(tmp_path / "run")[-1], "updates.")
    assert {key: int(value) for key, value in updates.items()} == {"student": 3, "critic": 3}


def test_a_start_of_another_size_is_one_line(tmp_path: Path) -> None:
    teacher = file_of(tmp_path / "teacher.safetensors")
    other = file_of(tmp_path / "other.safetensors", ffn_dim=160, has_sla=True)
    said = r"other.safetensors is of another size than the teacher \(ffn_dim 160 and 96\); take one of the same size"
    for train, how in ((train_sla, SLAConfig()), (train_rcm, RCM)):
        with pytest.raises(CheckpointError, match=said):
            train(how, settings(), teacher, Latents(), tmp_path / "run", CPU, start=other)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"text_dim": 32}, "takes texts of width 32 and 0 condition channels; the data has 24 and 0"),
        ({"in_dim": 36}, "takes texts of width 24 and 20 condition channels; the data has 24 and 0"),
        ({"in_dim": 36, "image_dim": 48}, "takes CLIP tokens"),
    ],
)
def test_a_teacher_that_does_not_fit_the_data_is_one_line(tmp_path: Path, sizes: dict, said: str) -> None:
    teacher = file_of(tmp_path / "teacher.safetensors", **sizes)
    for train, how in ((train_sla, SLAConfig()), (train_rcm, RCM)):
        with pytest.raises(CheckpointError, match=said):
            train(how, settings(), teacher, Latents(), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()
