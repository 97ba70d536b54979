"""Weights repacked for speed: the same pictures, to the rounding that was asked for."""

from itertools import product

import pytest
import torch
from torch import nn

from turbowan.models.linear import Fp8Linear, Fp8RowLinear, Int8BlockLinear, Int8RowLinear
from turbowan.models.pack import file_format, full_weight, join_qkv, prepare, round_linears
from turbowan.models.transformer import AttentionConfig, TransformerConfig, WanTransformer

KINDS = {"int8_row": Int8RowLinear, "int8_block": Int8BlockLinear, "fp8_row": Fp8RowLinear}
ERRORS = {"int8_row": 0.02, "int8_block": 0.025, "fp8_row": 0.06}  # of a network of two blocks


@pytest.fixture
def net(fresh_seed):
    config = TransformerConfig(dim=256, ffn_dim=384, num_layers=2, text_dim=48, has_sla=True)
    net = WanTransformer(config, AttentionConfig("sla", 1.0, 64, 64)).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return net


@torch.no_grad()
def velocity(net, batch=2):
    torch.manual_seed(1)
    latent, text = torch.randn(batch, 16, 3, 12, 10), torch.randn(batch, 7, 48)
    return net(latent, torch.linspace(900, 100, batch), text)


@pytest.mark.parametrize("format", list(KINDS))
def test_linear_layers_are_rounded_and_joined(format, net, relative_error):
    expected = velocity(net)
    round_linears(net, format)
    layers = [net.blocks[0].self_attn.q, net.blocks[1].cross_attn.v, net.blocks[0].ffn[2]]
    assert {type(layer) for layer in layers} == {KINDS[format]}
    assert type(net.blocks[0].self_attn.proj_l) is type(net.patch_embedding) is nn.Linear
    rounded = velocity(net)
    assert 0 < relative_error(rounded, expected) < ERRORS[format]
    codes = net.blocks[0].ffn[0]
    round_linears(net, format)
    assert net.blocks[0].ffn[0] is codes  # what is in the format stays
    join_qkv(net)
    assert type(net.blocks[0].self_attn.qkv) is KINDS[format]
    assert not hasattr(net.blocks[0].self_attn, "q")
    assert torch.equal(velocity(net), rounded)
    join_qkv(net)
    assert torch.equal(velocity(net), rounded)


def test_full_precision_layers_join(net):
    expected = velocity(net)
    join_qkv(net)
    assert net.blocks[1].self_attn.qkv.weight.shape == (768, 256)
    torch.testing.assert_close(velocity(net), expected, rtol=1e-4, atol=1e-5)


def test_layers_of_different_kinds_stay_apart_and_agree(net, relative_error):
    """Each rounds what it reads on its own then; a scale per row makes that the same codes."""
    expected = velocity(net)
    whole = net.blocks[0].self_attn.k
    round_linears(net, "int8_row")
    net.blocks[0].self_attn.k = whole
    join_qkv(net)
    assert net.blocks[0].self_attn.qkv is None
    assert net.blocks[1].self_attn.qkv is not None
    assert relative_error(velocity(net), expected) < ERRORS["int8_row"]


@pytest.mark.parametrize(
    ("format", "how"), [("int8_row", "addition"), *product(("bf16", "int8_row"), ("hook", "pre hook", "forward"))]
)
def test_layers_that_somebody_changed_stay_apart(format, how, net):
    """What an adapter adds, and what a hook hears, belongs to one of the three."""
    if format != "bf16":
        round_linears(net, format)
    layer = net.blocks[0].self_attn.k
    if how == "addition":
        layer.addition = torch.zeros_like
    elif how == "hook":
        layer.register_forward_hook(lambda *_: None)
    elif how == "pre hook":
        layer.register_forward_pre_hook(lambda *_: None)
    else:
        layer.forward = layer.forward
    join_qkv(net)
    assert net.blocks[0].self_attn.qkv is None
    assert net.blocks[0].self_attn.k is layer
    assert net.blocks[1].self_attn.qkv is not None


@pytest.mark.parametrize("wanted", [True, False])
def test_a_joined_layer_wants_a_gradient_where_its_parts_did(wanted, net):
    net.requires_grad_(wanted)
    join_qkv(net)
    assert {parameter.requires_grad for parameter in net.blocks[0].self_attn.qkv.parameters()} == {wanted}


@pytest.mark.parametrize(("format", "dtype"), [("fp8_row", torch.bfloat16), ("int8_row", torch.float32)])
def test_a_float8_layer_keeps_the_bias_that_its_product_takes(format, dtype, net):
    """Rounded once, not at each call, where a file has it in float32; int8 products add it as it is."""
    net.bfloat16()
    round_linears(net, "int8_block")
    net.blocks[0].ffn[2].bias = bias = torch.randn(256)
    round_linears(net, format)
    rounded = net.blocks[0].ffn[2].bias
    assert rounded.dtype == dtype
    assert torch.equal(rounded, bias.to(dtype))


def test_from_one_format_to_another(net, relative_error):
    expected = velocity(net)
    round_linears(net, "int8_block")
    round_linears(net, "int8_row")
    assert relative_error(velocity(net), expected) < ERRORS["int8_block"] + ERRORS["int8_row"]


def test_on_a_cpu_layers_keep_their_names(net):
    prepare(net, "bf16")
    assert net.blocks[0].self_attn.qkv is None
    assert type(net.blocks[0].self_attn.q) is nn.Linear


def test_the_format_of_a_file(net):
    assert file_format(net) == "bf16"
    for format in KINDS:
        prepare(net, format)
        assert file_format(net) == format
    block = net.blocks[1]
    block.ffn[0] = nn.Linear(256, 384)
    assert file_format(net) == "mixed"
    before = dict(net.named_modules())
    prepare(net, "mixed")
    assert dict(net.named_modules()) == before
    for module in net.blocks.modules():
        for name in [name for name, layer in module.named_children() if isinstance(layer, (nn.Linear, Fp8RowLinear))]:
            setattr(module, name, Fp8Linear(8, 8))
    prepare(net, "int8_row")
    assert file_format(net) == "int8_row"


def test_8_bit_layers_expanded_to_full_precision(net, relative_error):
    round_linears(net, "int8_block")
    rounded = velocity(net)
    layer = net.blocks[0].ffn[0]
    weight = full_weight(layer)
    round_linears(net, "bf16")
    assert file_format(net) == "bf16"
    assert torch.equal(net.blocks[0].ffn[0].weight, weight)
    assert torch.equal(net.blocks[0].ffn[0].bias, layer.bias)
    assert 0 < relative_error(velocity(net), rounded) < ERRORS["int8_block"]
    kept = net.blocks[0].ffn[0]
    round_linears(net, "bf16")
    assert net.blocks[0].ffn[0] is kept
