"""What every operation owes its callers: a true schema and fake, a gradient, a tangent, an untouched input."""

import pytest
import torch

from turbowan import ops
from turbowan.ops import OPERATIONS

pytestmark = pytest.mark.usefixtures("fresh_seed")


def draw(*shape):
    return torch.randn(shape)


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)


def attention_inputs(batch=2, length=70, keys=70, heads=2, size=64):
    return draw(batch, length, heads, size), draw(batch, keys, heads, size), draw(batch, keys, heads, size)


def sla_inputs(*options):
    q, k, v = attention_inputs(length=150, keys=150)
    return q, k, v, draw(64, 64) / 8, draw(64), *options


def product_inputs(quantise, *options):
    weight, weight_scale = quantise(draw(9, 140))
    return *quantise(draw(5, 140)), weight, weight_scale.squeeze(-1), draw(9), *options


def qk_inputs(*blocks):
    qkv = draw(2, 12, 3, 2, 64)
    return qkv[:, :, 0], qkv[:, :, 1], draw(128), draw(128), *ops.rope_table(2, 3, 2, 64), 1e-6, *blocks


def residual_inputs(*options, absent=()):
    rows = dict(zip(("gate", "shift", "scale"), draw(2, 3, 1, 96).unbind(1), strict=True))
    tensors = {"x": draw(2, 7, 96), "delta": draw(2, 7, 96), "gate": None, "weight": draw(96), "bias": draw(96)} | rows
    return *(None if name in absent else x for name, x in tensors.items()), 1e-6, *options


def causal_inputs(past):
    x, residual = draw(2, 3, 4, 5, 12), draw(2, 2, 4, 5, 12)
    return x, draw(12), residual, draw(12), draw(2, 2, 4, 5, 12) if past else None


# operation -> fresh arguments of several kinds; every tensor that is float32 can be differentiated
SAMPLES = {
    "attention": [
        lambda: (*attention_inputs(), 1),
        lambda: (*attention_inputs(keys=9), 5),
        lambda: (*attention_inputs(heads=1, length=1), 1),
        lambda: (*(x.transpose(1, 2) for x in attention_inputs(length=2, keys=2)), 1),
    ],
    "block_map": [lambda: (draw(2, 3, 150, 64), draw(2, 3, 150, 64), 0.4, 128, 64)],
    "causal_input": [
        lambda: (*causal_inputs(True), True, 2, 3, True, 0),
        lambda: (*causal_inputs(False), True, 2, 5, False, 1),
        lambda: (draw(2, 8, 3, 4, 5).movedim(1, -1), None, None, None, None, False, 1, 3, False, 0),
    ],
    "channel_norm": [
        lambda: (draw(2, 8, 3, 4, 5), draw(8, 1, 1, 1), True),
        lambda: (draw(2, 8, 4, 5).contiguous(memory_format=torch.channels_last), draw(8, 1, 1), False),
        lambda: (draw(2, 3, 8, 4, 5).transpose(1, 2), draw(8, 1, 1, 1), True),
    ],
    "conv3d": [
        lambda: (draw(2, 4, 5, 6, 7), draw(8, 4, 3, 3, 3), draw(8), [1, 1, 1], [0, 1, 1]),
        lambda: (draw(1, 4, 5, 6, 6), draw(4, 4, 3, 1, 1), None, [2, 1, 1], [0, 0, 0]),
        lambda: (draw(2, 5, 4, 6, 7).transpose(1, 2), draw(8, 4, 3, 3, 3), draw(8), [1, 1, 1], [0, 1, 1]),
        lambda: (channels_last(2, 4, 5, 6, 7), draw(8, 4, 3, 3, 3), draw(8), [1, 1, 1], [0, 1, 1]),
        lambda: (draw(2, 4, 5, 6, 7), channels_last(8, 4, 3, 3, 3), draw(8), [1, 1, 1], [0, 1, 1]),
        lambda: (channels_last(2, 4, 5, 6, 7), draw(8, 4, 1, 1, 1), None, [1, 1, 1], [0, 0, 0]),
    ],
    "gelu_rows": [
        lambda: (draw(2, 7, 96), "bf16"),
        lambda: (draw(7, 2, 96).transpose(0, 1), "int8_row"),
        lambda: (draw(2, 130, 140), "int8_block"),
        lambda: (draw(1, 130, 140), "fp8_row"),
    ],
    "linear": [
        lambda: (draw(5, 24), draw(9, 24), draw(9), "gelu_tanh"),
        lambda: (draw(1, 24), draw(9, 24), None, "none"),
    ],
    "layer_norm": [
        lambda: (draw(2, 7, 96), draw(96), draw(96), 1e-6, "exact"),
        lambda: (draw(2, 7, 96), None, None, 1e-6, "official"),
        lambda: (draw(7, 2, 96).transpose(0, 1), draw(96), draw(96), 1e-6, "exact"),
    ],
    "linear_fp8_scaled": [
        lambda: (draw(2, 5, 16), draw(8, 16).to(torch.float8_e4m3fn), torch.rand(1), draw(8)),
        lambda: (draw(5, 2, 16).transpose(0, 1), draw(8, 16).to(torch.float8_e4m3fn), torch.rand(8), None),
    ],
    "product_fp8_rowwise": [lambda: product_inputs(ops.quantize_fp8_rowwise, torch.float32)],
    "product_int8_blockwise": [lambda: product_inputs(ops.quantize_int8_blockwise, torch.bfloat16)],
    "product_int8_rowwise": [lambda: product_inputs(ops.quantize_int8_rowwise, torch.float32, "gelu_tanh")],
    "quantize_fp8_rowwise": [lambda: (draw(5, 7),), lambda: (draw(7, 5).T,)],
    "quantize_int8_blockwise": [lambda: (draw(150, 140),), lambda: (draw(140, 150).T,)],
    "quantize_int8_rowwise": [lambda: (draw(5, 7),), lambda: (draw(7, 5).T,)],
    "qk_norm_rope": [
        lambda: qk_inputs(8, 4),
        lambda: qk_inputs(0, 0),
        lambda: (draw(2, 2, 12, 64).transpose(1, 2), *qk_inputs(0, 5)[1:]),
    ],
    "residual_norm": [
        lambda: residual_inputs("exact", "bf16"),
        lambda: residual_inputs("official", "bf16", absent=("delta", "gate", "weight", "bias")),
        lambda: (draw(7, 2, 96).transpose(0, 1), *residual_inputs("exact", "bf16", absent=("shift", "scale"))[1:]),
        lambda: residual_inputs("exact", "int8_block"),
        lambda: residual_inputs("exact", "int8_row", absent=("delta", "gate")),
        lambda: residual_inputs("exact", "fp8_row"),
    ],
    "rms_norm": [lambda: (draw(2, 7, 96), draw(96), 1e-6), lambda: (draw(7, 2, 96).transpose(0, 1), draw(96), 1e-6)],
    "rope": [
        lambda: (draw(2, 12, 3, 64), *ops.rope_table(2, 3, 2, 64)),
        lambda: (draw(2, 3, 12, 64).transpose(1, 2), *ops.rope_table(2, 3, 2, 64)),
    ],
    "sparse_linear_attention": [
        lambda: sla_inputs(0.5, 128, 64, "bf16"),
        lambda: sla_inputs(0.5, 64, 128, "int8"),
    ],
    "upsample": [
        lambda: (draw(2, 3, 4, 5, 8), draw(8), draw(2, 3, 4, 5, 8), None, 1),
        lambda: (draw(2, 3, 4, 5, 8), draw(8), None, draw(2, 1, 4, 5, 4), 2),
    ],
}
CASES = [pytest.param(name, make, id=f"{name}-{i}") for name, made in SAMPLES.items() for i, make in enumerate(made)]
DIFFERENTIABLE = [
    case
    for case in CASES
    if case.values[0] not in ("block_map", "quantize_int8_blockwise", "quantize_int8_rowwise")
    and OPERATIONS[case.values[0]].gradient
    and not {"int8", "int8_row", "int8_block", "fp8_row"} & {x for x in case.values[1]() if isinstance(x, str)}
]


def test_every_operation_is_here():
    assert sorted(SAMPLES) == sorted(OPERATIONS)


@pytest.mark.parametrize(("name", "make"), CASES)
def test_schema_and_fake_are_true(name, make):
    """PyTorch's own check: no hidden mutation or alias, and shapes, strides and dtypes as the fake foretells."""
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name in ("linear_fp8_scaled", "product_fp8_rowwise"):
        checks.remove("test_schema")  # it multiplies the inputs, which PyTorch cannot do in float8
    torch.library.opcheck(getattr(torch.ops.turbowan, name).default, make(), test_utils=checks)


@pytest.mark.parametrize(("name", "make"), CASES)
def test_the_fake_is_true_in_bfloat16(name, make):
    args = [x.bfloat16() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x for x in make()]
    if name in ("rope", "linear_fp8_scaled") or name.startswith("product_"):
        args[1:] = make()[1:]  # tables and scales are float32 always
    torch.library.opcheck(getattr(torch.ops.turbowan, name).default, args, test_utils="test_faketensor")


@pytest.mark.parametrize(("name", "make"), CASES)
def test_inputs_stay_as_they_were(name, make):
    args = make()
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in tensors]
    OPERATIONS[name](*args)
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old.float(), new.float())


@pytest.mark.parametrize(("name", "make"), CASES)
def test_autocast_changes_nothing(name, make):
    """An operation keeps to the dtypes it documents; under autocast its fake would otherwise be wrong."""
    args = make()
    expected = OPERATIONS[name](*args)
    with torch.autocast("cpu", torch.bfloat16):
        ours = OPERATIONS[name](*args)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def differentiable(make):
    """Fresh arguments: a function that puts other tensors in the places of the float32 ones, and these."""
    args = make()
    places = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.dtype == torch.float32]

    def place(tensors):
        full = list(args)
        for i, x in zip(places, tensors, strict=True):
            full[i] = x
        return full

    return place, tuple(args[i] for i in places)


@pytest.mark.parametrize(("name", "make"), DIFFERENTIABLE)
def test_gradient_and_tangent_agree_with_differences(name, make):
    """Along a random direction: <gradient, d> from backward, the tangent from jvp, and a central difference."""
    place, inputs = differentiable(make)
    direction = tuple(torch.randn_like(x) for x in inputs)

    def function(*tensors):
        out = OPERATIONS[name](*place(tensors))
        return out if isinstance(out, torch.Tensor) else torch.cat([x.flatten() for x in out])

    weights = torch.randn_like(function(*inputs))
    out, tangent = torch.func.jvp(function, inputs, direction)
    assert torch.allclose(out, function(*inputs), atol=1e-5)
    leaves = [x.clone().requires_grad_() for x in inputs]
    (function(*leaves) * weights).sum().backward()
    backward = sum((x.grad * d).sum() for x, d in zip(leaves, direction, strict=True)).item()
    forward = (tangent * weights).sum().item()
    scale = (tangent.norm() * weights.norm()).item() / tangent.numel() ** 0.5 + 1e-6
    assert forward == pytest.approx(backward, abs=1e-4 * scale)

    step = 1e-3
    ahead, behind = (function(*(x + s * d for x, d in zip(inputs, direction, strict=True))) for s in (step, -step))
    difference = (ahead - behind) / (2 * step)
    if name == "sparse_linear_attention":
        return  # its selection may jump between the two points; the tangent holds it fixed
    assert (difference - tangent).norm() <= 2e-2 * tangent.norm() + 1e-6


@pytest.mark.parametrize("format", ["fp8_rowwise", "int8_blockwise", "int8_rowwise"])
def test_what_has_no_tangent_refuses(format):
    from turbowan.errors import MachineError

    x, weight = draw(5, 140), getattr(ops, f"quantize_{format}")(draw(9, 140))
    with pytest.raises(MachineError, match="has no gradient"):
        torch.func.jvp(lambda y: getattr(ops, f"linear_{format}")(y, *weight), (x,), (x,))


@pytest.mark.parametrize(("name", "make"), CASES)
def test_compiles_as_one_node(name, make):
    torch._dynamo.reset()
    args = make()
    counted = []

    def backend(graph, example_inputs):
        counted.extend(n for n in graph.graph.nodes if n.op == "call_function" and "turbowan" in str(n.target))
        return graph.forward

    ours = torch.compile(lambda *a: OPERATIONS[name](*a), fullgraph=True, backend=backend)(*args)
    torch.testing.assert_close(ours, OPERATIONS[name](*args))
    assert len(counted) == 1
