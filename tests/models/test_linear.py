"""The layers whose weights stay in 8 bits."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)

from turbowan import ops
from turbowan.models.linear import (
    Fp8Linear,
    Fp8RowLinear,
    Int8BlockLinear,
    Int8RowLinear,
    format_of,
    hidden_rows,
    read_rows,
)

pytestmark = pytest.mark.usefixtures("fresh_seed")


def quantised(kind, layer):
    """The 8-bit layer of a full-precision one."""
    small = kind(layer.in_features, layer.out_features)
    if kind is Int8BlockLinear:
        small.int8_weight, small.scale = ops.quantize_int8_blockwise(layer.weight.detach())
    elif kind in (Int8RowLinear, Fp8RowLinear):
        quantize = ops.quantize_int8_rowwise if kind is Int8RowLinear else ops.quantize_fp8_rowwise
        small.weight, small.weight_scale = quantize(layer.weight.detach())
    else:
        small.scale_weight = layer.weight.detach().abs().max().view(1) / 448
        small.weight = (layer.weight.detach() / small.scale_weight).to(torch.float8_e4m3fn)
    small.bias = layer.bias.detach().clone()
    return small


@pytest.mark.parametrize("kind", [Int8BlockLinear, Int8RowLinear, Fp8Linear])
@pytest.mark.parametrize("shape", [(1, 5), (2, 130), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stands_in_for_a_linear_layer(kind, shape, dtype, relative_error):
    layer = nn.Linear(200, 90).requires_grad_(False)
    x = torch.randn(*shape, 200, dtype=dtype)
    out = quantised(kind, layer)(x)
    assert out.shape == (*shape, 90)
    assert out.dtype == dtype
    assert 1e-4 < relative_error(out, layer(x.float())) < 0.06


@pytest.mark.parametrize("kind", [Int8BlockLinear, Int8RowLinear, Fp8Linear])
def test_an_addition_is_added_exactly_and_asks_for_numbers(kind, relative_error):
    layer, x = nn.Linear(200, 90).requires_grad_(False), torch.randn(2, 5, 200)
    small, change = quantised(kind, layer), 0.1 * torch.randn(90, 200)
    plain, before = small(x), format_of(small)
    small.addition = lambda given: given @ change.T
    assert format_of(small) == "bf16"
    assert relative_error(small(x) - plain, x @ change.T) < 1e-4
    small.addition = None
    assert format_of(small) == before


@pytest.mark.parametrize("kind", [Int8BlockLinear, Int8RowLinear, Fp8RowLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 130), (2, 130), (2, 128)])
def test_gelu_of_the_numbers_is_no_pass_of_its_own(kind, dtype, shape, monkeypatch, relative_error):
    """Where an adapter of the second layer wants them, the first one's product makes them."""
    layer = quantised(kind, nn.Linear(200, 90))
    x = torch.randn(*shape, 200, dtype=dtype)
    expected = nn.functional.gelu(layer(x), approximate="tanh")
    monkeypatch.setattr(ops, "gelu_rows", None)
    hidden = hidden_rows(layer, read_rows(x, layer.format), dtype, "bf16")
    assert hidden.values.dtype == dtype
    assert hidden.values.shape == (shape[0] * shape[1], 90)
    assert (hidden.format, hidden.scale.numel()) == ("bf16", 0)
    assert relative_error(hidden.samples(hidden.values), expected) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("rows", [1, 100, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_never_cross_samples(rows, dtype):
    """Bit for bit: what a sample gives does not depend on what it is batched with, however large that is."""
    layer = quantised(Int8BlockLinear, nn.Linear(200, 90))
    x = torch.randn(3, rows, 200, dtype=dtype)
    x[1] *= 1000
    whole = layer(x)
    for i in range(3):
        assert torch.equal(layer(x[i : i + 1]), whole[i : i + 1])


def test_fp8_without_bias():
    layer = Fp8Linear(8, 4, bias=False)
    layer.weight.copy_(torch.eye(4, 8).to(torch.float8_e4m3fn))
    x = torch.randn(2, 8)
    assert torch.equal(layer(x), x[:, :4])


def rolled(out):
    return out.roll(1, dims=-1)


def change(layer, how):
    """Have the layer's result rolled, in one of the ways of PyTorch; returns what undoes it."""
    if how == "forward":
        plain = layer.forward
        layer.forward = lambda x: rolled(plain(x))
        return lambda: vars(layer).pop("forward")
    if how == "compiled":
        layer._compiled_call_impl = lambda x: rolled(layer.forward(x))  # what `layer.compile()` sets
        return lambda: setattr(layer, "_compiled_call_impl", None)
    if how == "hook":
        return layer.register_forward_hook(lambda _, __, out: rolled(out)).remove
    return register_module_forward_hook(lambda module, _, out: rolled(out) if module is layer else None).remove


@pytest.mark.parametrize("name", ["self_attn.q", "cross_attn.o", "ffn.0", "ffn.2"])
@pytest.mark.parametrize("how", ["hook", "global hook", "forward", "compiled"])
@torch.no_grad()
def test_who_changes_a_layer_is_heard(name, how, make_transformer, relative_error):
    """A plain layer's product is taken without calling it, unless somebody hooked into it or replaced its `forward`."""
    net = make_transformer()
    inputs = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 48)
    before = net(*inputs)
    layer = net.blocks[1].get_submodule(name)
    undo = change(layer, how)
    after = net(*inputs)
    assert relative_error(after, before) > 1e-3
    undo()
    assert torch.equal(net(*inputs), before)
    layer.weight, layer.bias = (nn.Parameter(x.roll(1, dims=0)) for x in (layer.weight, layer.bias))
    assert relative_error(net(*inputs), after) <= 1e-5


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", ["self_attn.q", "cross_attn.o", "ffn.0", "ffn.2"])
@pytest.mark.parametrize("how", ["backward", "backward pre", "global backward", "global backward pre"])
def test_who_watches_a_gradient_is_heard(name, how, make_transformer):
    net = make_transformer().requires_grad_()
    layer, seen = net.blocks[1].get_submodule(name), []

    def hook(module, *_):
        seen.append(module)

    watch = {
        "backward": layer.register_full_backward_hook,
        "backward pre": layer.register_full_backward_pre_hook,
        "global backward": register_module_full_backward_hook,
        "global backward pre": register_module_full_backward_pre_hook,
    }[how](hook)
    try:
        net(torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 48)).sum().backward()
    finally:
        watch.remove()
    assert layer in seen


@pytest.mark.parametrize("kind", [Int8BlockLinear, Int8RowLinear])
def test_who_changes_an_8_bit_layer_is_heard(kind, make_transformer, relative_error):
    """It then reads numbers, and is called."""
    net = make_transformer()
    ffn = net.blocks[1].ffn
    ffn[2] = quantised(kind, ffn[2])
    inputs = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 48)
    with torch.no_grad():
        before = net(*inputs)
        watch = ffn[2].register_forward_hook(lambda _, __, out: rolled(out))
        assert format_of(ffn[2]) == "bf16"
        assert relative_error(net(*inputs), before) > 1e-3
        watch.remove()
        assert torch.equal(net(*inputs), before)
