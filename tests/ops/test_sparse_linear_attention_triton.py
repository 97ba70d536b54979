"""SLA and SageSLA by kernels, part by part and as a whole: on a GPU in bfloat16, else by Triton's interpreter."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from turbowan import ops
from turbowan.errors import MachineError
from turbowan.ops.block_map import block_means

pytest.importorskip("triton")
from turbowan.ops.triton import sage_attention, sage_quantize, sparse_attention
from turbowan.ops.triton.linear_state import Config, candidates, linear_state
from turbowan.ops.triton.sparse_linear_attention import sparse_linear_attention as whole

pytestmark = pytest.mark.usefixtures("fresh_seed")

twin = importlib.import_module("turbowan.ops.sparse_linear_attention")
ON_GPU = torch.cuda.is_available()
ON_HOPPER = ON_GPU and torch.cuda.get_device_capability() == (9, 0)
DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float32, torch.float16]
BARS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
LENGTHS = [1, 200, 333] if ON_GPU else [1, 197]
GEOMETRIES = [(128, 64), (64, 128), (64, 64)]


def configs(block_q, block_k):
    """The table's choice (None), loads without descriptors, and on Hopper Triton's own loop beside ours by hand."""
    if ON_GPU:
        pipelined = [sparse_attention.Config(64, 3, descriptors=True)] if ON_HOPPER else []
        return [None, sparse_attention.Config(128, 2), sparse_attention.Config(64, 2), *pipelined]
    return [sparse_attention.Config(192 - tile, 2, tile, tile == 64) for tile in (64, 128) if tile <= block_k]


def draw(device, dtype, length, size=64, batch=2, heads=2, kept=3, block_q=128, block_k=64):
    """q, k, v, an odd projection, and random lists that hold the last key block at times."""
    q, k, v = (torch.randn(batch, length, heads, size, device=device) for _ in range(3))
    k = k + torch.randn(heads, size, device=device)
    weight, bias = torch.randn(size, size, device=device) / size**0.5, torch.randn(size, device=device)
    key_blocks = -(-length // block_k)
    draws = torch.rand(batch, heads, -(-length // block_q), key_blocks, device=device)
    lists = draws.argsort(dim=-1)[..., : min(kept, key_blocks)].sort(dim=-1).values.to(torch.int32)
    return [x.to(dtype) for x in (q, k, v)], weight, bias, lists


def reference(inputs, weight, bias, lists, block_q, block_k, precision="bf16"):
    """The eager twin's branches on the given lists, in float32 after what SageSLA rounds."""
    branch = twin.exact_branch_int8 if precision == "int8" else twin.exact_branch
    q, k, v = (x.transpose(1, 2) if precision == "int8" else x.transpose(1, 2).float() for x in inputs)
    sparse = branch(q, k, v, lists.long(), block_q, block_k)
    linear = F.linear(twin._linear_branch(q.float(), k.float(), v.float()), weight, bias)
    return (sparse + linear).transpose(1, 2)


def run(inputs, weight, bias, lists, block_q, block_k, config=None):
    return sparse_attention.sparse_attention(
        *inputs, lists, *linear_state(*inputs[1:], weight), bias, block_q, block_k, config
    )


def run_sage(inputs, weight, bias, lists, block_q, block_k, config=None):
    q, k, v = inputs
    keys = sage_quantize.quantize_blocks(k, k.float().mean(dim=1), block_k)
    values = sage_quantize.quantize_values(v)
    state = linear_state(k, v, weight)
    return sage_attention.sage_attention(q, keys, values, lists, *state, bias, block_q, block_k, config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("length", [1, 130, 2100])
def test_linear_state(kernels, guarded, relative_error, dtype, size, length):
    (_, k, v), weight, *_ = draw(kernels, dtype, length, size, heads=1)
    folded, key_sums = guarded(linear_state, k, v, weight)
    phi = k.double().softmax(dim=-1).transpose(1, 2)
    expected = phi.transpose(-1, -2) @ v.double().transpose(1, 2) @ weight.double().T
    assert relative_error(folded, expected * size / length) <= BARS[dtype]
    assert relative_error(key_sums, phi.sum(dim=2) * size / length) <= BARS[dtype]
    again = linear_state(k, v, weight)
    assert torch.equal(folded, again[0])
    assert torch.equal(key_sums, again[1])


@pytest.mark.parametrize("config", [*candidates(), Config(1), Config(2, 32, descriptors=False)], ids=str)
def test_every_state_of_the_sweep(kernels, guarded, relative_error, config):
    """Few programs of many tiles among them."""
    (_, k, v), weight, *_ = draw(kernels, DTYPES[0], 200, 128, heads=1)
    for ours, usual in zip(guarded(linear_state, k, v, weight, config), linear_state(k, v, weight), strict=True):
        assert relative_error(ours, usual) <= BARS[DTYPES[0]]


@pytest.mark.parametrize("dtype", DTYPES[:1] if ON_GPU else DTYPES[1:], ids=str)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("block_q", "block_k"), GEOMETRIES)
@pytest.mark.parametrize("length", LENGTHS)
def test_sparse_attention(kernels, guarded, relative_error, dtype, size, block_q, block_k, length):
    case = draw(kernels, dtype, length, size, heads=1 + ON_GPU, block_q=block_q, block_k=block_k)
    expected = reference(*case, block_q, block_k)
    for config in configs(block_q, block_k):
        ours = guarded(run, *case, block_q, block_k, config)
        assert ours.dtype == dtype
        assert relative_error(ours, expected) <= BARS[dtype], config
        assert torch.equal(ours, run(*case, block_q, block_k, config)), config


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize(
    ("length", "kept", "heads", "size"),
    [*((700, kept, 1, 128) for kept in (1, 2, 4)), *((640 + more, 5, 1, 128) for more in (1, 63, 64, 65)),
     (4000, 5, 8, 128), (4033, 6, 8, 64)],
)  # fmt: skip
def test_programs_that_take_several_blocks(guarded, relative_error, block_k, length, kept, heads, size):
    """Few and many key blocks, short last ones, and more query blocks than processors."""
    case = draw("cuda", torch.bfloat16, length, size, 2, heads, kept, 128, block_k)
    ours = guarded(run, *case, 128, block_k)
    assert relative_error(ours, reference(*case, 128, block_k)) <= 5e-3
    for _ in range(10):
        assert torch.equal(run(*case, 128, block_k), ours)


@pytest.mark.parametrize("dtype", DTYPES[:1], ids=str)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("block_q", "block_k"), GEOMETRIES)
@pytest.mark.parametrize("length", LENGTHS)
def test_sage_attention(kernels, guarded, relative_error, dtype, size, block_q, block_k, length):
    case = draw(kernels, dtype, length, size, heads=1 + ON_GPU, block_q=block_q, block_k=block_k)
    expected = reference(*case, block_q, block_k, "int8")
    for config in (None, sage_attention.Config(64 if size == 64 else 128, 2, size == 64)):
        ours = guarded(run_sage, *case, block_q, block_k, config)
        # a code may fall to the other side of a tie
        assert relative_error(ours, expected) <= max(5e-4, BARS[dtype]), config
        assert torch.equal(ours, run_sage(*case, block_q, block_k, config)), config


def test_e4m3_of_the_interpreter_is_pytorchs(kernels):
    if ON_GPU:
        pytest.skip("the GPU has its own instruction")
    v = torch.randn(1, 300, 1, 64) * torch.logspace(-4, 2, 300)[:, None, None]
    codes, scales = sage_quantize.quantize_values(v)
    expected = (v.transpose(1, 2) / scales[:, :, None]).to(torch.float8_e4m3fn).float()
    in_order = codes.unflatten(-1, (-1, 4, 2, 2)).transpose(-2, -3).flatten(-4)  # see `sage_quantize.as_stored`
    assert torch.equal(in_order[..., :300], expected.transpose(-1, -2))
    assert (in_order[..., 300:] == 0).all()


@pytest.mark.parametrize("run", [run, run_sage])
def test_logits_far_below_zero(kernels, relative_error, run):
    """The running maximum starts below them; a last key block that ends early adds nothing."""
    inputs, weight, bias, lists = draw(kernels, DTYPES[0], 130, kept=2, heads=1, batch=1)
    inputs[0].fill_(8)
    inputs[1].sub_(8)
    lists[..., 0], lists[..., 1] = 0, 2
    expected = reference(inputs, weight, bias, lists, 128, 64, "int8" if run is run_sage else "bf16")
    assert relative_error(run(inputs, weight, bias, lists, 128, 64), expected) <= max(5e-4, BARS[DTYPES[0]])


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("side_by_side", [True, False])
def test_reads_views_in_place(kernels, relative_error, precision, side_by_side):
    """Parts of a wider tensor, and heads that do not lie side by side."""
    inputs, weight, bias, _ = draw(kernels, DTYPES[0], 200)
    if side_by_side:
        views = torch.stack(inputs, dim=2).unbind(2)
    else:
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    expected = whole(*inputs, weight, bias, 0.5, 128, 64, precision)
    assert relative_error(whole(*views, weight, bias, 0.5, 128, 64, precision), expected) <= BARS[DTYPES[0]]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_sample_is_not_touched_by_the_next(kernels, precision):
    (q, k, v), weight, bias, _ = draw(kernels, DTYPES[0], 200, heads=1)
    alone = whole(q[:1], k[:1], v[:1], weight, bias, 0.5, 128, 64, precision)
    q[1], k[1], v[1] = torch.nan, torch.nan, torch.nan
    assert torch.equal(whole(q, k, v, weight, bias, 0.5, 128, 64, precision)[:1], alone)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize(("block_q", "block_k"), GEOMETRIES)
def test_the_whole_operation(kernels, relative_error, precision, block_q, block_k):
    """With the means given and without; whole numbers, and keys of mean zero, leave no near ties."""
    inputs, weight, bias, _ = draw(kernels, DTYPES[0], 320, heads=1)
    inputs = [x.mul(2).round() for x in inputs]
    inputs[1][:, 160:] = -inputs[1][:, :160]
    means = [block_means(x.transpose(1, 2), block) for x, block in zip(inputs, (block_q, block_k), strict=False)]
    options = (weight, bias, 0.4, block_q, block_k, precision)
    exact = inputs if precision == "int8" else [x.float() for x in inputs]
    with ops.force(sparse_linear_attention="eager"):
        expected = ops.sparse_linear_attention(*exact, *options, means=means)
    with ops.force(sparse_linear_attention="triton"):
        ours = ops.sparse_linear_attention(*inputs, *options, means=means)
        without = ops.sparse_linear_attention(*inputs, *options)
    bar = max(5e-4, BARS[DTYPES[0]])
    assert relative_error(ours, expected) <= bar
    assert relative_error(without, expected) <= bar


@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else DTYPES[:1], ids=str)
@pytest.mark.parametrize("ratio", ["0.2", "0.5"])
@pytest.mark.parametrize("size", [64, 128])
def test_recorded_sla(kernels, recorded, relative_error, dtype, size, ratio):
    names = [f"{name}{size}" for name in ("q", "k", "v", "proj_w", "proj_b")]
    *inputs, expected = recorded("ops.safetensors", *names, f"sla{size}@{ratio}")
    inputs = [x.to(kernels, dtype) for x in inputs]
    with ops.force(sparse_linear_attention="triton"):
        assert relative_error(ops.sparse_linear_attention(*inputs, float(ratio)).cpu(), expected) <= 0.005


@pytest.mark.skipif(not ON_GPU, reason="codes follow from k rounded to bfloat16, which the interpreter cuts off")
@pytest.mark.parametrize("ratio", ["0.2", "0.5"])
def test_recorded_sagesla(kernels, recorded, relative_error, ratio):
    names = [f"{name}128" for name in ("q", "k", "v", "proj_w", "proj_b")]
    *inputs, expected = recorded("ops.safetensors", *names, f"sagesla_sm90_128@{ratio}")
    inputs = [x.to(kernels, DTYPES[0]) for x in inputs]
    with ops.force(sparse_linear_attention="triton"):
        ours = ops.sparse_linear_attention(*inputs, float(ratio), block_q=64, block_k=128, precision="int8")
    assert relative_error(ours.cpu(), expected) <= 0.005


def test_other_blocks_are_the_eager_twins(kernels):
    """By itself; by force the kernels refuse them, and are not swapped for the twin."""
    inputs, weight, bias, _ = draw(kernels, DTYPES[0], 70, heads=1)
    options = (weight, bias, 0.5, 32, 16, "bf16")
    assert torch.equal(ops.sparse_linear_attention(*inputs, *options), twin.in_plain_pytorch(*inputs, *options))
    with ops.force(sparse_linear_attention="triton"), pytest.raises(MachineError, match="needs blocks of 64/128"):
        ops.sparse_linear_attention(*inputs, *options)


@pytest.mark.parametrize(("capability", "fits"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_8_bits_need_a_gpu_that_has_e4m3(monkeypatch, capability, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    operation = ops.OPERATIONS["sparse_linear_attention"]
    kernel = next(i for i in operation.implementations if i.name == "triton")
    q = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert kernel.fits(q, q, q, None, None, 0.1, 128, 64, "bf16") is None
    assert (kernel.fits(q, q, q, None, None, 0.1, 128, 64, "int8", None, None) is None) == fits


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize(("block_q", "block_k"), GEOMETRIES)
def test_true_sizes(relative_error, precision, block_q, block_k):
    """A 480p video, three heads: against the eager twin in float32, and bitwise the same 100 times over."""
    (q, k, v), weight, bias, _ = draw("cuda", torch.bfloat16, 32760, 128, batch=1, heads=3)
    means = [block_means(x.transpose(1, 2), block) for x, block in ((q, block_q), (k, block_k))]
    options = (weight, bias, 0.1, block_q, block_k, precision)
    exact = (q, k, v) if precision == "int8" else (q.float(), k.float(), v.float())
    with ops.force(sparse_linear_attention="eager"):
        expected = ops.sparse_linear_attention(*exact, *options, means=means)
    first = ops.sparse_linear_attention(q, k, v, *options, means=means)
    assert relative_error(first, expected) <= 5e-3
    for _ in range(100):
        assert torch.equal(ops.sparse_linear_attention(q, k, v, *options, means=means), first)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_runs_in_a_graph(precision):
    """No launch waits for the GPU."""
    inputs, weight, bias, _ = draw("cuda", torch.bfloat16, 5000, 128)
    expected = whole(*inputs, weight, bias, 0.1, 128, 64, precision)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = whole(*inputs, weight, bias, 0.1, 128, 64, precision)
    graph.replay()
    assert torch.equal(ours, expected)
