"""Attention to few keys, by the kernel: on a GPU in bfloat16, else by Triton's interpreter."""

import pytest
import torch

from turbowan import ops
from turbowan.errors import MachineError

pytest.importorskip("triton")
from turbowan.ops.attention import FEW, LONGEST
from turbowan.ops.triton import short_attention

pytestmark = pytest.mark.usefixtures("fresh_seed")

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float32, torch.float16]
BARS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
if ON_GPU:
    CONFIGS = [None, short_attention.Config(64, 4, 2)]  # the table's choice, and loads without descriptors
else:
    CONFIGS = [short_attention.Config(64, 4, 2, descriptors) for descriptors in (False, True)]


def eager(q, k, v, count=1):
    return ops.OPERATIONS["attention"].eager(q.double(), k.double(), v.double(), count)


def draw(device, dtype, length, keys, heads=2, size=64, batch=2):
    q = torch.randn(batch, length, heads, size, device=device)
    k, v = torch.randn(2, batch, keys, heads, size, device=device)
    return [x.to(dtype) for x in (q, k, v)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "keys", "size"), [(1, 1, 64), (70, 21, 128), (129, 64, 64), (65, 130, 128)])
def test_equals_the_eager_twin(kernels, guarded, relative_error, config, dtype, length, keys, size):
    q, k, v = draw(kernels, dtype, length, keys, size=size)
    config = config or short_attention.config_for(short_attention.CONFIGS, kernels)  # it takes more than 128 keys, too
    ours = guarded(short_attention.attention, q, k, v, 1, config)
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    assert relative_error(ours, eager(q, k, v)) <= BARS[dtype]
    assert torch.equal(ours, short_attention.attention(q, k, v, 1, config))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("count", [2, 491])
@pytest.mark.parametrize("keys", [16, 22, 65])
def test_the_last_key_stands_for_many(kernels, relative_error, config, count, keys):
    """Also where it takes most of the weight, as the padding of a prompt does."""
    q, k, v = draw(kernels, DTYPES[0], 40, keys)
    k[:, -1] = 0.25 * q.mean(dim=1)
    ours = short_attention.attention(q, k, v, count, config)
    assert relative_error(ours, eager(q, k, v, count)) <= BARS[DTYPES[0]]


@pytest.mark.parametrize("count", [2, 150, 491])
def test_the_count_is_not_rounded(kernels, count):
    q, k, v = (torch.zeros(1, n, 1, 128, dtype=DTYPES[-1], device=kernels) for n in (1, 1001, 1001))
    v[:, -1] = 1
    with ops.force(attention="triton"):
        share = ops.attention(q, k, v, last_key_count=count).double().mean().item()
    assert share == pytest.approx(count / (count + 1000), rel=2**-10)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_reads_views_in_place(kernels, relative_error, config):
    """Parts of a wider tensor, and heads that do not lie side by side."""
    q, k, v = draw(kernels, DTYPES[0], 70, 70, size=64)
    expected = eager(q, k, v)
    parts = torch.stack([q, k, v], dim=2).unbind(2)
    assert relative_error(short_attention.attention(*parts, 1, config), expected) <= BARS[DTYPES[0]]
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert relative_error(short_attention.attention(*swapped, 1, config), expected) <= BARS[DTYPES[0]]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_sample_is_not_touched_by_the_next(kernels, config):
    """Rows past a sample's end are another's; nothing of them may come in, NaN neither."""
    q, k, v = draw(kernels, DTYPES[0], 40, 21)
    expected = short_attention.attention(q[:1], k[:1], v[:1], 1, config)
    k[1], v[1], q[1] = torch.nan, torch.nan, torch.nan
    assert torch.equal(short_attention.attention(q, k, v, 1, config)[:1], expected)


@pytest.mark.parametrize(("keys", "count"), [(LONGEST + 1, 3), (FEW + 1, 1)])
def test_more_keys_are_pytorchs(kernels, keys, count):
    """By itself; by force the kernel refuses them, and is not swapped for another."""
    q, k, v = draw(kernels, DTYPES[0], 5, keys, heads=1, batch=1)
    assert torch.equal(ops.attention(q, k, v, count), ops.OPERATIONS["attention"].eager(q, k, v, count))
    with ops.force(attention="triton"):
        with pytest.raises(MachineError, match=f"is for {keys - 1} keys at most, got {keys}"):
            ops.attention(q, k, v, count)
        ops.attention(q, k[:, 1:], v[:, 1:], count)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(("keys", "count"), [(512, 1), (64, 449)])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_true_sizes(relative_error, config, keys, count):
    q, k, v = draw("cuda", torch.bfloat16, 32760, keys, heads=12, size=128, batch=1)
    expected = ops.OPERATIONS["attention"].eager(q.float(), k.float(), v.float(), count)
    assert relative_error(short_attention.attention(q, k, v, count, config), expected) <= 5e-3
