"""From any family's file into training, and from a training state to any family's file."""

from __future__ import annotations

import json

import pytest
import torch

from turbowan.checkpoints import load_transformer
from turbowan.checkpoints.convert import LAYOUTS
from turbowan.checkpoints.families import WRITERS
from turbowan.checkpoints.files import read_tensors, write_tensors
from turbowan.checkpoints.quantize import quantize_transformer
from turbowan.errors import CheckpointError, Note
from turbowan.models.transformer import TransformerConfig, WanTransformer
from turbowan.train import checkpoint
from turbowan.train.export import export_transformer, load_for_training

SIZES = TransformerConfig(dim=128, ffn_dim=256, num_layers=2, text_dim=24, has_sla=True)


@pytest.fixture
def trained(tmp_path, fresh_seed) -> tuple:
    """A run's folder with two states, and the student's and the averaged weights of the second."""
    nets = [WanTransformer(SIZES).state_dict() for _ in range(3)]
    folder = tmp_path / "run"
    for step, (student, average) in enumerate(((nets[2], nets[2]), (nets[0], nets[1]))):
        state = {f"model.student.{key}": value for key, value in student.items()}
        checkpoint.save(folder, step, state | {f"average.{key}": value for key, value in average.items()})
    return folder, nets[0], nets[1]


@pytest.mark.parametrize("to", LAYOUTS)
def test_a_state_becomes_a_file_of_each_family(tmp_path, trained, to):
    folder, student, average = trained
    for name, expected in (("average", average), ("student", student)):
        target = tmp_path / f"{name}.safetensors"
        assert export_transformer(folder, target, to, name, torch.float32) == [target]
        net = load_transformer(target)
        assert net.config == SIZES
        assert all(torch.equal(value, expected[key]) for key, value in net.state_dict().items())


def test_the_default_is_the_newest_average_in_bfloat16(tmp_path, trained):
    folder, _, average = trained
    export_transformer(folder, tmp_path / "out.safetensors")
    tensors = read_tensors(tmp_path / "out.safetensors")
    assert all(torch.equal(value, average[key].to(torch.bfloat16)) for key, value in tensors.items())
    export_transformer(folder / "step-00000000", tmp_path / "older.pth")
    assert not torch.equal(
        read_tensors(tmp_path / "older.pth")["head.head.weight"], average["head.head.weight"].to(torch.bfloat16)
    )
    weights, config = export_transformer(folder, tmp_path / "diffusers", "diffusers")
    assert json.loads(config.read_text())["num_layers"] == 2
    assert load_transformer(weights).config == SIZES


@pytest.mark.parametrize(
    ("source", "net", "to", "said"),
    [
        ("none", "average", "wan", "holds no training state"),
        ("run", "critic", "wan", r"step-00000001 holds nothing named model\.critic\."),
        ("run", "average", "paper", "there is no layout 'paper'"),
    ],
)
def test_what_cannot_be_exported_is_one_line(tmp_path, trained, source, net, to, said):
    with pytest.raises(CheckpointError, match=said):
        export_transformer(tmp_path / source, tmp_path / "out.safetensors", to, net)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("family", ["official", "turbowan", "wan", "comfy", "diffusers"])
def test_training_starts_from_a_file_of_each_family(tmp_path, family, fresh_seed):
    state = {key: value.to(torch.bfloat16) for key, value in WanTransformer(SIZES).state_dict().items()}
    write_tensors(tmp_path / "net.safetensors", WRITERS["transformer", family](state))
    net = load_for_training(tmp_path / "net.safetensors")
    assert net.attention.kind == "sla"
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(torch.equal(value, state[key].float()) for key, value in net.state_dict().items())


def test_eight_bits_are_expanded_with_a_note(tmp_path, fresh_seed, relative_error):
    state = {key: value.to(torch.bfloat16) for key, value in WanTransformer(SIZES).state_dict().items()}
    path = tmp_path / "net-quant.pth"
    write_tensors(path, WRITERS["transformer", "official"](quantize_transformer(state)))
    with pytest.warns(Note, match="its weights are expanded, and training starts from their rounded values"):
        net = load_for_training(path)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert sorted(net.state_dict()) == sorted(state)
    weight = net.blocks[1].ffn[0].weight
    assert 0 < relative_error(weight, state["blocks.1.ffn.0.weight"].float()) < 0.02
    given = torch.randn(1, 16, 1, 4, 6), torch.tensor([500.0]), torch.randn(1, 3, 24)
    assert relative_error(net(*given), load_transformer(path)(*given)) < 0.05
    net.requires_grad_(True)(*given).square().mean().backward()
    assert net.blocks[0].self_attn.q.weight.grad.abs().max() > 0
