"""Two experts as one network: who predicts, who learns, and where they start."""

from __future__ import annotations

import pytest
import torch

from turbowan.models.transformer import AttentionConfig, TransformerConfig, WanTransformer
from turbowan.train.data import Batch, Draws
from turbowan.train.experts import NAMES, Experts
from turbowan.train.rcm import RCM, RCMConfig

pytestmark = pytest.mark.usefixtures("fresh_seed")

CPU = torch.device("cpu")
SIZES = TransformerConfig(dim=128, ffn_dim=64, num_layers=2, text_dim=8, freq_dim=32, in_dim=36, has_sla=True)


def batch_of(rows: int = 2) -> Batch:
    return Batch(torch.randn(rows, 16, 2, 4, 4), torch.randn(rows, 3, 8), torch.randn(rows, 20, 2, 4, 4))


def test_the_noise_level_says_who_predicts() -> None:
    net = Experts(WanTransformer(SIZES), 0.9)
    for parameter in net.low.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    batch = batch_of()
    for times, name in (((990.0, 905.0), "high"), ((900.0, 950.0), "high"), ((899.0, 12.0), "low")):
        given = batch.latents, torch.tensor(times), batch.text, batch.condition
        ours, theirs, other = (
            expert(*given, text_rows=512) for expert in (net, getattr(net, name), getattr(net, NAMES[name == "high"]))
        )
        assert torch.equal(ours, theirs)
        assert not torch.allclose(ours, other, atol=1e-3)


def test_both_start_from_the_same_weights_and_share_none() -> None:
    source = WanTransformer(SIZES)
    net = Experts(source, 0.9)
    high, low = (dict(getattr(net, name).named_parameters()) for name in NAMES)
    assert high.keys() == low.keys()
    assert all(torch.equal(high[key], low[key]) and high[key] is not low[key] for key in high)
    assert sorted(net.state_dict()) == sorted(f"{name}.{key}" for name in NAMES for key in source.state_dict())
    assert list(net.blocks) == [*net.high.blocks, *net.low.blocks]
    assert len(list(net.parameters())) == 2 * len(high)
    net.attention = AttentionConfig("sla", 0.25, 64, 64)
    assert net.attention == net.high.attention == net.low.attention == AttentionConfig("sla", 0.25, 64, 64)


def learners(method: RCM, step: int) -> set[str]:
    """Which experts a step's loss reaches."""
    method.student.zero_grad(set_to_none=True)
    draws = Draws(4, step, range(2), CPU)
    sum(method.losses(batch_of(), step, draws).values()).backward()
    reached = set()
    for name in NAMES:
        gradients = [parameter.grad for parameter in getattr(method.student, name).parameters()]
        assert len({gradient is None for gradient in gradients}) == 1  # all of an expert's, or none
        reached |= {name} if gradients[0] is not None else set()
    return reached


def test_each_learns_from_its_own_noise() -> None:
    """Consistency in turn; a sample by its last step, which of 1 to 4 is at 0.995, 0.934, 0.853 and 0.609."""
    net = WanTransformer(SIZES)
    student = Experts(net, 0.9)
    settings = {"guidance_scale": 1.0, "simulation_times": "sampler", "sigma_max": 200.0, "boundary": 0.9}
    teacher, critic, negative = WanTransformer(SIZES), WanTransformer(SIZES), torch.zeros(1, 1, 8)
    consistency = RCM(RCMConfig(score_weight=0.0, **settings), student, teacher, critic, negative)
    assert [learners(consistency, step) for step in range(4)] == [{"high"}, {"low"}, {"high"}, {"low"}]
    score = RCM(RCMConfig(consistency_weight=0.0, student_every=3, **settings), student, teacher, critic, negative)
    assert [learners(score, step) for step in (0, 3, 6, 9)] == [{"high"}, {"high"}, {"low"}, {"low"}]
    assert [learners(score, step) for step in (1, 2, 4)] == [set()] * 3
