"""SLA with NVIDIA's block-sparse attention: the real one on a GPU that has it, else a stand-in with its interface."""

import importlib
import importlib.util
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from turbowan import ops
from turbowan.errors import MachineError, Note
from turbowan.ops.block_map import block_means

pytest.importorskip("triton")
from turbowan.ops import cudnn_attention, registry
from turbowan.ops.registry import Constraints

pytestmark = pytest.mark.usefixtures("fresh_seed")

ON_GPU = torch.cuda.is_available()
HERE = ON_GPU and importlib.util.find_spec("cudnn") is not None


def plain_forward(q, k, v, rows, *, block_sizes, sparse_block_size, layout):
    """What the documentation says, with an explicit mask; q's length must be whole blocks."""
    assert (layout, sparse_block_size) == ("bshd", 64)
    assert rows.dtype == torch.int32
    assert q.shape[1] % 64 == 0
    assert tuple(rows.shape[:3]) == (q.shape[0], q.shape[2], q.shape[1] // 64)
    blocks = -(-k.shape[1] // 64)
    sizes = torch.full((blocks,), 64) if block_sizes is None else block_sizes
    listed = torch.zeros(*rows.shape[:3], blocks, dtype=torch.bool).scatter_(-1, rows.long(), True)
    position = torch.arange(64)
    inside = (position < sizes[:, None]).flatten()[: k.shape[1]]
    mask = listed.repeat_interleave(64, 2).repeat_interleave(64, 3)[..., : k.shape[1]] & inside
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    logits = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return {"o_tensor": (logits.softmax(dim=-1) @ v).transpose(1, 2)}


def install(monkeypatch, forward):
    module = ModuleType("cudnn.block_sparse_attention")
    if forward is not None:
        module.block_sparse_attention_forward = forward
    monkeypatch.setitem(sys.modules, "cudnn", ModuleType("cudnn"))
    monkeypatch.setitem(sys.modules, "cudnn.block_sparse_attention", module)
    cudnn_attention.problem.cache_clear()


def draw(device, dtype, length, size=64):
    q, k, v = torch.randn(3, 2, length, 2, size, device=device).mul(2).round().to(dtype).unbind(0)
    return q, k, v, torch.randn(size, size, device=device) / size**0.5, torch.randn(size, device=device)


@pytest.mark.skipif(ON_GPU, reason="the stand-in is for machines without a GPU")
@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("length", [1, 128, 200])
def test_what_is_handed_over(monkeypatch, relative_error, block_q, length):
    """Rows for query blocks of 64, whole blocks of q, the true length of the last key block; and the branch added."""
    install(monkeypatch, plain_forward)
    inputs = draw("cpu", torch.float32, length)
    means = [block_means(x.transpose(1, 2), block) for x, block in zip(inputs, (block_q, 64), strict=False)]
    options = (0.5, block_q, 64, "bf16")
    ours = cudnn_attention.sparse_linear_attention(*inputs, *options, *means)
    expected = ops.sparse_linear_attention(*inputs, *options, means=means)
    assert relative_error(ours, expected) <= 1e-5


@pytest.fixture
def on_this_cpu(monkeypatch):
    """The operation with NVIDIA's attention offered first, on a CPU too; then our own kernel and the eager twin."""
    operation = ops.OPERATIONS["sparse_linear_attention"]
    cudnn = next(i for i in operation.implementations if i.name == "cudnn")
    chosen = [replace(cudnn, constraints=Constraints(), priority=2), *operation.implementations]
    monkeypatch.setattr(operation, "implementations", chosen)
    monkeypatch.setattr(operation, "_chosen", {})


@pytest.mark.skipif(ON_GPU, reason="the stand-in is for machines without a GPU")
def test_what_is_wrong_or_missing_is_not_used(monkeypatch, on_this_cpu):
    """By itself: a note once, and the next implementation. By force: an error."""

    def wrong(q, k, v, rows, **options):
        return plain_forward(q, k, v.roll(1, dims=1), rows, **options)

    arguments = (*draw("cpu", torch.float32, 70), 0.5, 128, 64)
    with ops.force(sparse_linear_attention="eager"):
        expected = ops.sparse_linear_attention(*arguments)
    for forward, what in ((wrong, "is off by"), (None, "does not run here")):
        install(monkeypatch, forward)
        with pytest.warns(Note, match=what) as notes:
            found = [ops.sparse_linear_attention(*arguments) for _ in range(3)]
        assert all(torch.equal(x, expected) for x in found)
        assert len(notes) == 1
        with ops.force(sparse_linear_attention="cudnn"), pytest.raises(MachineError, match=f"for this call .{what}"):
            ops.sparse_linear_attention(*arguments)


@pytest.mark.skipif(ON_GPU, reason="the stand-in is for machines without a GPU")
@pytest.mark.parametrize(
    ("rest", "fits"), [((128, 64, "bf16"), True), ((64, 128, "bf16"), False), ((64, 64, "int8"), False)]
)
def test_what_it_is_not_for(monkeypatch, on_this_cpu, relative_error, rest, fits):
    install(monkeypatch, plain_forward)
    arguments = (*draw("cpu", torch.float32, 70), 0.5, *rest)
    with ops.force(sparse_linear_attention="eager"):
        expected = ops.sparse_linear_attention(*arguments)
    ours = ops.sparse_linear_attention(*arguments)
    assert torch.equal(ours, expected) != fits
    assert relative_error(ours, expected) <= 1e-5
    with ops.force(sparse_linear_attention="cudnn"):
        if fits:
            assert torch.equal(ops.sparse_linear_attention(*arguments), ours)
        else:
            with pytest.raises(MachineError, match="is for key blocks of 64 and precision bf16"):
                ops.sparse_linear_attention(*arguments)


@pytest.mark.parametrize(("capability", "chosen"), [((8, 9), "triton"), ((9, 0), "triton"), ((12, 0), "cudnn")])
def test_where_it_is_chosen(monkeypatch, capability, chosen):
    """On Hopper our own kernel is faster; it cannot run on older GPUs."""
    monkeypatch.setattr(registry, "_installed", lambda _: True)
    choice = ops.OPERATIONS["sparse_linear_attention"].select(ops.Facts("cuda", torch.bfloat16, 128, capability))
    assert choice.implementation.name == chosen


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="needs a CUDA device and nvidia-cudnn-frontend")
@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("length", [1, 200, 5000])
def test_nvidias_own(relative_error, block_q, length):
    inputs = draw("cuda", torch.bfloat16, length, 128)
    means = [block_means(x.transpose(1, 2), block) for x, block in zip(inputs, (block_q, 64), strict=False)]
    with ops.force(sparse_linear_attention="cudnn"):
        ours = ops.sparse_linear_attention(*inputs, 0.3, block_q, 64, means=means)
    with ops.force(sparse_linear_attention="eager"):
        expected = ops.sparse_linear_attention(*(x.float() for x in inputs), 0.3, block_q, 64, means=means)
    assert relative_error(ours, expected) <= 5e-3
