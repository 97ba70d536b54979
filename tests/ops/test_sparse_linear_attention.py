"""SLA and SageSLA: recorded results, an explicit masked computation on fresh input, and the memory it may take."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turbowan import ops
from turbowan.errors import RequestError
from turbowan.ops.block_map import block_means

pytestmark = pytest.mark.usefixtures("fresh_seed")

GEOMETRIES = [(128, 64), (64, 128), (64, 64)]  # tokens per query block and per key block
CASES = [(128, *geometry) for geometry in GEOMETRIES] + [(64, 128, 64)]  # head size first


def draw(batch, length, heads, size, dtype=torch.float32):
    q, k, v = (torch.randn(batch, length, heads, size, dtype=dtype) for _ in range(3))
    return q, k + torch.randn(heads, size, dtype=dtype), v, torch.randn(size, size) / size**0.5, torch.randn(size)


def linear_branch(q, k, v, weight, bias):
    """phi(q) (phi(k)^T v) / (1e-5 + phi(q) sum phi(k)) through proj_l; phi is softmax over the head. Heads first."""
    phi_q, phi_k = q.softmax(dim=-1), k.softmax(dim=-1)
    weights = phi_q @ phi_k.transpose(-1, -2)
    return F.linear(weights @ v / (1e-5 + weights.sum(dim=-1, keepdim=True)), weight.double(), bias.double())


def formula(q, k, v, weight, bias, ratio, block_q, block_k):
    """Both branches in float64 with an explicit L x L mask, from the same block map."""
    length = q.shape[1]
    kept = ops.block_map(q.transpose(1, 2), k.transpose(1, 2), ratio, block_q, block_k).bool()
    mask = kept.repeat_interleave(block_q, dim=2).repeat_interleave(block_k, dim=3)[:, :, :length, :length]
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    logits = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -math.inf)
    out = logits.softmax(dim=-1) @ v + linear_branch(q, k, v, weight, bias)
    return out.transpose(1, 2)


@pytest.mark.parametrize("ratio", ["0.2", "0.5"])
@pytest.mark.parametrize("size", [64, 128])
def test_recorded_sla(size, ratio, recorded, relative_error):
    names = [f"{name}{size}" for name in ("q", "k", "v", "proj_w", "proj_b")]
    *inputs, expected = recorded("ops.safetensors", *names, f"sla{size}@{ratio}")
    assert relative_error(ops.sparse_linear_attention(*inputs, float(ratio)), expected) <= 0.005


@pytest.mark.parametrize("ratio", ["0.2", "0.5"])
def test_recorded_sagesla(ratio, recorded, relative_error):
    names = [f"{name}128" for name in ("q", "k", "v", "proj_w", "proj_b")]
    *inputs, expected = recorded("ops.safetensors", *names, f"sagesla_sm90_128@{ratio}")
    ours = ops.sparse_linear_attention(*inputs, float(ratio), block_q=64, block_k=128, precision="int8")
    assert relative_error(ours, expected) <= 0.005


@pytest.mark.parametrize(("size", "block_q", "block_k"), CASES)
@pytest.mark.parametrize("length", [1, 40, 129, 450])
def test_equals_the_masked_formula(length, size, block_q, block_k, relative_error):
    inputs = draw(2, length, 2, size)
    for ratio in (0.1, 0.6):
        ours = ops.sparse_linear_attention(*inputs, ratio, block_q, block_k)
        assert ours.is_contiguous()
        assert relative_error(ours, formula(*inputs, ratio, block_q, block_k)) <= 1e-5


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("length", [1, 129, 400])
def test_equals_the_masked_formula_in_bfloat16(length, geometry, relative_error):
    inputs = draw(2, length, 2, 128, torch.bfloat16)
    ours = ops.sparse_linear_attention(*inputs, 0.4, *geometry)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, formula(*inputs, 0.4, *geometry)) <= 8e-3


def test_all_blocks_kept_is_dense_attention_plus_the_linear_branch(relative_error):
    q, k, v, weight, bias = draw(2, 333, 2, 64)
    out = ops.sparse_linear_attention(q, k, v, torch.zeros_like(weight), bias, 1.0)
    assert relative_error(out, ops.attention(q, k, v) + bias) <= 1e-5


def test_query_blocks_gathered_in_parts_give_the_same(monkeypatch):
    """The exact branch bounds its scratch memory by working on a few query blocks at a time."""
    inputs = draw(1, 700, 2, 64)
    whole = ops.sparse_linear_attention(*inputs, 0.3)
    monkeypatch.setattr(sys.modules["turbowan.ops.sparse_linear_attention"], "_GATHER_ELEMENTS", 1)
    assert torch.allclose(ops.sparse_linear_attention(*inputs, 0.3), whole, atol=1e-6)


def rounded_half_away(x):
    return torch.where(x < 0, -torch.floor(0.5 - x), torch.floor(x + 0.5))


def streamed(q, k, v, block_q, block_k, kept):
    """SageSLA's sparse branch for one head [L, D], a row of queries and a key block at a time, as the kernels go."""
    length, size = q.shape
    smooth = k - k.mean(dim=0)
    v_scale = v.float().abs().amax(dim=0) / 2.25
    codes_v = (v.float() / v_scale).to(torch.float8_e4m3fn).double()

    def quantise(x):
        scale = x.float().abs().max() / 127 + 1e-7
        return rounded_half_away(x.float() / scale).double(), scale.double()

    out = torch.empty(length, size, dtype=torch.float64)
    for a in range(kept.shape[0]):
        rows = slice(a * block_q, min((a + 1) * block_q, length))
        codes_q, scale_q = quantise(q[rows])
        top = torch.full((codes_q.shape[0],), -5e6, dtype=torch.float64)
        total, mixed = torch.zeros_like(top), torch.zeros(codes_q.shape[0], size, dtype=torch.float64)
        for b in kept[a].nonzero().flatten().tolist():
            columns = slice(b * block_k, min((b + 1) * block_k, length))
            codes_k, scale_k = quantise(smooth[columns])
            logits = codes_q @ codes_k.T * (scale_q * scale_k * size**-0.5 * math.log2(math.e))
            new_top = torch.maximum(top, logits.amax(dim=1))
            p = torch.exp2(logits - new_top[:, None] + 8.807)
            decay = torch.exp2(top - new_top)
            total = total * decay + p.sum(dim=1)
            mixed = mixed * decay[:, None] + p.float().to(torch.float8_e4m3fn).double() @ codes_v[columns]
            top = new_top
        out[rows] = mixed / total[:, None] * v_scale.double()
    return out


@pytest.mark.parametrize(("size", "block_q", "block_k"), CASES)
@pytest.mark.parametrize("length", [1, 40, 129, 400])
def test_int8_rounds_as_the_kernels_do(length, size, block_q, block_k, relative_error):
    *inputs, weight, bias = draw(2, length, 2, size)
    q, k, v = (x.transpose(1, 2) for x in inputs)
    kept = ops.block_map(q, k, 0.4, block_q, block_k)
    sparse = torch.empty(q.shape, dtype=torch.float64)
    for head in itertools.product(range(2), range(2)):
        sparse[head] = streamed(q[head], k[head], v[head], block_q, block_k, kept[head])
    expected = sparse + linear_branch(q.double(), k.double(), v.double(), weight, bias)
    ours = ops.sparse_linear_attention(*inputs, weight, bias, 0.4, block_q, block_k, precision="int8")
    assert relative_error(ours, expected.transpose(1, 2)) <= 5e-4  # a code may fall to the other side of a tie


def test_int8_codes_round_half_away_from_zero():
    """A query code of 2.5 becomes 3, which makes the first key win (2 would make it the second)."""
    unit = 2.0**20  # so large that the 1e-7 added to a scale vanishes
    q = torch.tensor([127.0, 2.5]).mul(unit).expand(4, 2)[None, :, None]
    k = torch.tensor([[10.0, 127.0], [11.0, 77.0], [-10.0, -127.0], [-11.0, -77.0]])[None, :, None]
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])[None, :, None]
    for sign, winner in ((1, [1.0, 0.0]), (-1, [0.0, 0.0])):
        out = ops.sparse_linear_attention(sign * q, k, v, torch.zeros(2, 2), torch.zeros(2), 1.0, precision="int8")
        assert out[0, 0, 0].tolist() == pytest.approx(winner, abs=1e-3)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_int8_stays_near_the_exact_branch(geometry, relative_error):
    q, k, v, weight, bias = draw(1, 700, 2, 128)
    weight, bias = torch.zeros_like(weight), torch.zeros_like(bias)
    exact = ops.sparse_linear_attention(q, k, v, weight, bias, 0.5, *geometry)
    ours = ops.sparse_linear_attention(q, k, v, weight, bias, 0.5, *geometry, precision="int8")
    assert 1e-3 < relative_error(ours, exact) < 0.08


def test_int8_survives_a_channel_of_zeros():
    q, k, v, weight, bias = draw(1, 100, 1, 64)
    v[..., 3] = 0
    assert ops.sparse_linear_attention(q, k, v, weight, bias, 0.5, precision="int8").isfinite().all()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_batch_equals_singles(precision):
    *inputs, weight, bias = draw(3, 200, 2, 64)
    whole = ops.sparse_linear_attention(*inputs, weight, bias, 0.3, precision=precision)
    for i in range(3):
        one = ops.sparse_linear_attention(*(x[i : i + 1] for x in inputs), weight, bias, 0.3, precision=precision)
        assert torch.allclose(whole[i : i + 1], one, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_no_tensor_is_as_large_as_length_squared(precision):
    """The eager twins run on true sizes: nothing they make comes near the 16.8 million elements of an L x L mask."""
    length = 4096
    inputs = draw(1, length, 1, 64)
    with LargestTensor() as seen:
        ops.OPERATIONS["block_map"].eager(*(x.transpose(1, 2) for x in inputs[:2]), 0.1, 128, 64)
        ops.OPERATIONS["sparse_linear_attention"].eager(*inputs, 0.1, 128, 64, precision)
    assert length * 64 <= seen.elements < length**2 / 8


def test_gradient_takes_no_length_squared_either():
    length = 4096
    inputs = [x.requires_grad_() for x in draw(1, length, 1, 64)]
    with LargestTensor() as seen:
        ops.sparse_linear_attention(*inputs, 0.1).sum().backward()
    assert length * 64 <= seen.elements < length**2 / 8


@pytest.mark.parametrize(("size", "block_q", "block_k"), CASES)
@pytest.mark.parametrize("length", [40, 129, 450])
def test_gradients_are_the_masked_formulas(length, size, block_q, block_k, monkeypatch, relative_error):
    """Of all five inputs, against float64 autograd of the formula, in one piece and gathered in parts."""
    inputs = [x.requires_grad_() for x in draw(2, length, 2, size)]
    weights = torch.randn(2, length, 2, size)
    expected = torch.autograd.grad((formula(*inputs, 0.4, block_q, block_k) * weights.double()).sum(), inputs)
    for elements in (1 << 27, 1):
        monkeypatch.setattr(sys.modules["turbowan.ops.sparse_linear_attention"], "_GATHER_ELEMENTS", elements)
        out = ops.sparse_linear_attention(*inputs, 0.4, block_q, block_k)
        ours = torch.autograd.grad((out * weights).sum(), inputs)
        for name, gradient, exact in zip(("q", "k", "v", "proj_weight", "proj_bias"), ours, expected, strict=True):
            assert relative_error(gradient, exact) <= 3e-4, name  # the bar is 1e-3; 2e-5 was seen


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("length", [40, 450])
def test_means_that_are_given_select_the_same(length, geometry, relative_error):
    """Whole numbers: a mean taken off block by block leaves what one taken off token by token does."""
    inputs = [x.mul(2).round() for x in draw(2, length, 2, 64)[:3]]
    projection = draw(1, 1, 1, 64)[3:]
    means = [block_means(x.transpose(1, 2), block) for x, block in zip(inputs, geometry, strict=False)]
    ours = ops.sparse_linear_attention(*inputs, *projection, 0.4, *geometry, means=means)
    expected = ops.sparse_linear_attention(*inputs, *projection, 0.4, *geometry)
    differing = (ours - expected).abs().amax(dim=(0, 2, 3)) > 1e-4
    assert differing.float().mean() <= 0.3, "more than a near tie or two"


def test_means_decide():
    """Given means that favour the second key block, it is the one attended to."""
    q, k, v, weight, bias = draw(1, 128, 1, 64)
    q_means, k_means = torch.ones(1, 1, 1, 64), torch.tensor([0.0, 1.0])[None, None, :, None].expand(1, 1, 2, 64)
    out = ops.sparse_linear_attention(q, k, v, 0 * weight, 0 * bias, 0.5, means=(q_means, k_means))
    assert torch.allclose(out, ops.attention(q, k[:, 64:], v[:, 64:]), atol=1e-5)


def test_refuses_bad_arguments():
    inputs = draw(1, 8, 1, 64)
    with pytest.raises(RequestError, match="precision must be one of bf16, int8, got 'fp4'"):
        ops.sparse_linear_attention(*inputs, 0.5, precision="fp4")
    for ratio in (0.0, 1.5):
        with pytest.raises(RequestError, match="sla_topk must be in"):
            ops.sparse_linear_attention(*inputs, ratio)


def test_int8_refuses_a_gradient_it_does_not_have():
    q, *rest = draw(1, 8, 1, 64)
    with pytest.raises(RequestError, match="no gradient"):
        ops.sparse_linear_attention(q.requires_grad_(), *rest, 0.5, precision="int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 70, 3, 64)}, "attention takes q"),
        ({"q": (2, 60, 2, 64)}, "as long as each other"),
        ({"proj_weight": (64, 128)}, r"got 70 and 70 tokens, \[64, 128\]"),
        ({"proj_bias": (1,)}, r"\[64, 64\], \[1\]"),
        ({"q_means": (2, 2, 1, 64)}, r"means of q's blocks of 64 must be \[2, 2, 2, 64\], got \[2, 2, 1, 64\]"),
        ({"k_means": (2, 2, 2, 64)}, r"means of k's blocks of 32 must be \[2, 2, 3, 64\], got \[2, 2, 2, 64\]"),
        ({"k_means": (2, 1, 3, 64)}, "means of k's blocks"),
        ({"k_means": (2, 2, 3, 128)}, "means of k's blocks"),
    ],
)
def test_shapes_that_do_not_go_together(change, message):
    shapes = dict.fromkeys(("q", "k", "v"), (2, 70, 2, 64)) | {"proj_weight": (64, 64), "proj_bias": (64,)}
    shapes |= {"q_means": (2, 2, 2, 64), "k_means": (2, 2, 3, 64)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    rest = {"topk_ratio": 0.5, "block_q": 64, "block_k": 32}

    def run(tensors):
        means = tensors.pop("q_means"), tensors.pop("k_means")
        return ops.sparse_linear_attention(**tensors, **rest, means=means)

    assert run(dict(tensors)).shape == (2, 70, 2, 64)
    with pytest.raises(RequestError, match=message):
        run(tensors | {name: torch.randn(shape) for name, shape in change.items()})
