"""SLA fine-tuning: what is aligned with what, at which noise, with which blocks, and that it aligns."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from turbowan.errors import TurbowanError
from turbowan.models.tokenizer import TEXT_LENGTH
from turbowan.models.transformer import AttentionConfig, TransformerConfig, WanTransformer
from turbowan.sampling import rcm
from turbowan.train import curve
from turbowan.train.data import Batch, Draws
from turbowan.train.sla import SLA, SLAConfig, with_sla
from turbowan.train.trainer import TrainerConfig, run

pytestmark = pytest.mark.usefixtures("fresh_seed")

CPU = torch.device("cpu")
SIZES = TransformerConfig(dim=128, ffn_dim=160, num_layers=2, text_dim=24, freq_dim=64)


class Latents:
    """Latents of 240 tokens, always the same for a row of a step."""

    negative = torch.zeros(1, 3, 24)

    def batch(self, step: int, rows: range) -> Batch:
        draws = Draws(3, step, rows, CPU)
        return Batch(draws.normal(16, 3, 16, 20), draws.normal(5, 24))


def draws_of(step: int = 0, rows: int = 2) -> Draws:
    return Draws(7, step, range(rows), CPU)


def dense() -> WanTransformer:
    """A teacher whose attention matters: larger queries, keys and values than at the start of a training."""
    net = WanTransformer(SIZES, AttentionConfig("original"))
    for block in net.blocks:
        attention = block.self_attn
        for part, scale in ((attention.norm_q, 2), (attention.norm_k, 2), (attention.v, 4)):
            part.weight.data.mul_(scale)
    return net.requires_grad_(False)


def test_sla_of_all_blocks_starts_as_the_teacher() -> None:
    """proj_l is zero and every key block kept: sparse attention is dense attention, and no loss is left."""
    teacher = dense()
    student = with_sla(deepcopy(teacher))
    assert all(not block.self_attn.proj_l.weight.any() and not block.self_attn.proj_l.bias.any()
               for block in student.blocks)  # fmt: skip
    loss = SLA(SLAConfig(top_k=1.0), student, teacher).losses(Latents().batch(0, range(2)), 0, draws_of())
    assert loss["alignment"].item() <= 1e-10
    few = SLA(SLAConfig(top_k=0.1), student, teacher).losses(Latents().batch(0, range(2)), 0, draws_of())
    assert few["alignment"].item() > 1e-5


def test_a_network_is_given_what_it_lacks_alone() -> None:
    net = WanTransformer(SIZES, AttentionConfig("original"), norms="official")
    student = with_sla(net)
    assert student.config == replace(SIZES, has_sla=True)
    assert student.norms == "official"
    state, own = net.state_dict(), student.state_dict()
    assert {key.split(".")[-2] for key in own.keys() - state.keys()} == {"proj_l"}
    assert all(own[key].data_ptr() == value.data_ptr() for key, value in state.items())  # no second copy in memory
    assert with_sla(student) is student


def test_the_loss_is_the_mean_square_of_two_velocities() -> None:
    """At x_t = (1 - t) x0 + t noise and time 1000 t, the teacher without a gradient."""
    teacher = dense()
    student = with_sla(deepcopy(teacher)).requires_grad_()
    batch, config = Latents().batch(4, range(2)), SLAConfig(top_k=0.3, blocks=[[32, 16]])
    loss = SLA(config, student, teacher).losses(batch, 0, draws_of())["alignment"]
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    same = draws_of()
    t = SLA(config, student, teacher)._times(same)
    noise, weight = same.normal(*batch.latents.shape[1:]), t.view(-1, 1, 1, 1, 1)
    given = batch.latents + weight * (noise - batch.latents), 1000 * t, batch.text
    with torch.no_grad():
        ours, theirs = (net(*given, text_rows=TEXT_LENGTH) for net in (student, teacher))
    assert loss.item() == pytest.approx(F.mse_loss(ours, theirs).item(), rel=1e-4)


def test_blocks_are_taken_in_turn() -> None:
    teacher = dense()
    student = with_sla(deepcopy(teacher))
    method = SLA(SLAConfig(top_k=0.4, blocks=[[64, 64], [128, 64], [64, 128]]), student, teacher)
    seen = []
    for step in range(4):
        method.losses(Latents().batch(step, range(1)), step, draws_of(step, 1))
        seen.append(student.attention)
    assert seen == [AttentionConfig("sla", 0.4, *pair) for pair in ((64, 64), (128, 64), (64, 128), (64, 64))]
    assert teacher.attention == AttentionConfig("original")


def test_training_aligns(tmp_path: Path) -> None:
    teacher = dense()
    student = with_sla(deepcopy(teacher)).requires_grad_()
    method = SLA(SLAConfig(top_k=0.2, blocks=[[32, 16]]), student, teacher)
    rates = {"student": 3e-4}
    settings = TrainerConfig(steps=30, batch=2, lr=rates, betas=(0.9, 0.99), warmup=3, ema=0.0, log_steps=10)

    @torch.no_grad()
    def apart() -> float:
        return method.losses(Latents().batch(1000, range(8)), 0, draws_of(1000, 8))["alignment"].item()

    before = apart()
    run(method, Latents(), settings, tmp_path, CPU)
    assert apart() < 0.85 * before
    lines = curve.read(tmp_path / curve.CURVE_FILE)
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["alignment"] < lines[0]["alignment"]


def times(config: SLAConfig, rows: int = 3000) -> torch.Tensor:
    net = torch.nn.Identity()
    return SLA(config, net, net)._times(draws_of(rows=rows))  # type: ignore[arg-type]


def test_times_are_log_normal_in_sigma() -> None:
    t = times(SLAConfig(time_mean=0.5, time_std=1.2)).double()
    log_sigma = (t / (1 - t)).log()
    assert log_sigma.mean().item() == pytest.approx(0.5, abs=0.12)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.1)


def test_an_expert_draws_from_its_range() -> None:
    for low, high in ((0.9, 1.0), (0.0, 0.9)):
        t = times(SLAConfig(noise_range=(low, high), sampler_share=0.5))
        assert low <= t.min() <= low + 0.3 * (high - low)
        assert high - 0.05 * (high - low) <= t.max() <= high


def test_the_samplers_times_have_their_share() -> None:
    """Equally among those of the grid (0.988, 0.934, 0.853, 0.609) that are within the range."""
    grid = rcm.timesteps(4, 80.0)[:-1].float()
    for noise_range, within in (((0.0, 1.0), grid), ((0.9, 1.0), grid[:2]), ((0.0, 0.9), grid[2:]), ((0.0, 0.5), [])):
        t = times(SLAConfig(sampler_share=0.4, noise_range=noise_range))
        shares = [(t == value).float().mean().item() for value in grid]
        wanted = [0.4 / len(within) if value in within else 0.0 for value in grid]
        assert shares == pytest.approx(wanted, abs=0.05)
        assert (t > 0).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"noise_range": (0.9, 0.2)}, "noise_range must rise within 0..1, got 0.9 to 0.2"),
        ({"noise_range": (0.0, 1.2)}, "noise_range must rise within 0..1"),
        ({"blocks": []}, "blocks must be pairs such as [[128, 64]], got []"),
        ({"blocks": [128, 64]}, "blocks must be pairs such as [[128, 64]], got [128, 64]"),
        ({"blocks": [[128, 64, 1]]}, "blocks must be pairs"),
        ({"blocks": [[128, 0]]}, "attention blocks must be positive, got 128 x 0"),
        ({"top_k": 0.0}, "sla_topk must be in (0, 1], got 0.0"),
        ({"sampler_steps": 6}, "the rcm sampler takes 1 to 4 steps, got 6"),
        ({"time_std": 0}, "time_std must be a positive number, got 0"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings: dict, said: str) -> None:
    with pytest.raises(TurbowanError) as error:
        SLAConfig(**settings)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
