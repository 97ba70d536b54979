"""The int8 products' kernels against their eager twins: every way to cut them, ragged sizes, canaries."""

from contextlib import contextmanager

import pytest
import torch

from turbowan import ops
from turbowan.ops import int8_blockwise, int8_rowwise

matmul_int8 = pytest.importorskip("turbowan.ops.triton.matmul_int8")
Config, HopperConfig = matmul_int8.Config, matmul_int8.HopperConfig

pytestmark = pytest.mark.usefixtures("fresh_seed")

ON_GPU = torch.cuda.is_available()
MODULES = {"row": int8_rowwise, "block": int8_blockwise}
KERNELS = {"row": matmul_int8.product_int8_rowwise, "block": matmul_int8.product_int8_blockwise}
BARS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
HALF = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter does not round to bfloat16
SMALL = {  # a tile of each path, small enough for the interpreter
    "row": [
        None,
        Config(64, 64, 64),
        Config(64, 64, 64, descriptors=False, per_sm=0),
        Config(64, 128, 64, group=2),
    ],
    "block": [
        None,
        Config(128, 128),
        Config(64, 64, descriptors=False, per_sm=0),
        Config(64, 128, group=2),
    ],
}
CASES = [pytest.param(kind, config, id=f"{kind}-{i}") for kind in SMALL for i, config in enumerate(SMALL[kind])]


def arguments(kind, m, n, k, device, bias=True):
    """Fresh codes, scales, weights, weight scales and bias."""
    module = MODULES[kind]
    x, weight = torch.randn(m, k).mul(torch.rand(m, 1)), torch.randn(n, k).mul(torch.rand(1, k))
    weight, weight_scale = module._quantize(weight)
    if kind == "row":
        weight_scale = weight_scale.flatten()
    parts = (*module._quantize(x), weight, weight_scale)
    return (*(part.to(device) for part in parts), torch.randn(n, device=device) if bias else None)


@contextmanager
def canaries(monkeypatch):
    """Results made inside are full of NaN at first and lie between guards, which must be whole at the end."""
    stores = []

    def empty(shape, dtype, device):
        count = torch.Size(shape).numel()
        stores.append((torch.full((count + 512,), torch.nan, dtype=dtype, device=device), count))
        return stores[-1][0][256 : 256 + count].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield
    assert stores
    for store, count in stores:
        assert store[:256].isnan().all()
        assert store[256 + count :].isnan().all()
        assert not store[256 : 256 + count].isnan().any()


@pytest.mark.parametrize(("kind", "config"), CASES)
@pytest.mark.parametrize("sizes", [(1, 8, 16), (150, 136, 160), (300, 130, 300)])
def test_equals_the_eager_twin(kind, config, sizes, kernels, monkeypatch, relative_error):
    """(300, 130, 300) has rows that the copy engine cannot read."""
    for dtype, bias in ((torch.float32, True), (HALF, False)):
        args = (*arguments(kind, *sizes, kernels, bias), dtype)
        with canaries(monkeypatch):
            out = KERNELS[kind](*args, config=config)
        assert out.dtype == dtype
        assert relative_error(out, MODULES[kind]._product(*args)) <= BARS[dtype]
        assert torch.equal(out, KERNELS[kind](*args, config=config))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of numpy, in the exponential of the interpreter
@pytest.mark.parametrize(("kind", "config"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_activation_of_the_rounded_result(kind, config, dtype, kernels, relative_error):
    args = (*arguments(kind, 70, 72, 144, kernels), dtype, "gelu_tanh")
    assert relative_error(KERNELS[kind](*args, config=config), MODULES[kind]._product(*args)) <= BARS[dtype]


@pytest.mark.parametrize("config", SMALL["row"])
def test_the_largest_sums_are_exact(config, kernels):
    """2,560 products of -128 and -128: beyond float32's 24 bits, within int32."""
    codes = torch.full((3, 2560), -128, dtype=torch.int8, device=kernels)
    codes[1, 0] = 127
    ones = torch.ones(3, 1, device=kernels)
    out = KERNELS["row"](codes, ones, codes, ones.flatten(), None, torch.float32, config=config)
    exact = codes.double() @ codes.double().T
    assert torch.equal(out, exact.float())


@pytest.mark.parametrize("kind", ["row", "block"])
def test_the_operation_finds_its_kernel(kind, kernels, relative_error):
    args = (*arguments(kind, 40, 48, 64, kernels), torch.float32)
    name = f"product_int8_{kind}wise"
    product = getattr(ops, name)
    with ops.force(**{name: "triton"}):
        out = product(*args)
    with ops.force(**{name: "eager"}):
        assert relative_error(out, product(*args)) <= 1e-6


def test_every_candidate_and_choice_fits_its_kernel():
    """Scale blocks of 128 limit the tiles; the copy engine limits its boxes to 256 rows."""
    for kind in ("row", "block"):
        chosen = [config for configs in matmul_int8.CONFIGS[kind].values() for config in configs]
        for config in (*chosen, *matmul_int8.candidates(kind)):
            if isinstance(config, HopperConfig):
                assert config.stages * 48 + 32 < 227
                continue
            assert max(config.block_m, config.block_n) <= (256 if kind == "row" else 128)
            assert kind == "row" or config.block_k == 128
        for capability, configs in matmul_int8.CONFIGS[kind].items():
            assert isinstance(configs[-1], Config), f"{capability} needs a last resort"


needs_hopper = pytest.mark.skipif(
    not ON_GPU or torch.cuda.get_device_capability() != (9, 0) or not matmul_int8.HAS_GLUON,
    reason="needs compute capability 9.0 and Triton 3.6",
)
CANDIDATES = [
    pytest.param(kind, config, id=f"{kind}-{i}")
    for kind in ("row", "block")
    for i, config in enumerate(matmul_int8.candidates(kind))
]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(("kind", "config"), CANDIDATES)
@pytest.mark.parametrize("sizes", [(1, 8, 16), (130, 264, 144), (1000, 1544, 1040), (4100, 1536, 5120)])
def test_candidates_on_the_gpu(kind, config, sizes, kernels, monkeypatch, relative_error):
    for activation, bias in (("none", True), ("gelu_tanh", False)):
        args = (*arguments(kind, *sizes, kernels, bias), torch.bfloat16, activation)
        with canaries(monkeypatch):
            out = KERNELS[kind](*args, config=config)
        assert relative_error(out, MODULES[kind]._product(*args)) <= 4e-3
        for _ in range(20):
            assert torch.equal(out, KERNELS[kind](*args, config=config))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("kind", ["row", "block"])
def test_results_past_two_billion_numbers(kind, kernels, relative_error):
    """75,600 rows of 41,472: the last ones are where they belong."""
    codes, scale, weight, weight_scale, bias = arguments(kind, 512, 41472, 128, kernels)
    many = codes.repeat(148, 1)[:75600]
    scales = scale.repeat(148, 1)[: 75600 if kind == "row" else -(-75600 // 128)]
    out = KERNELS[kind](many, scales, weight, weight_scale, bias, torch.bfloat16)
    tail = slice(75600 - 75600 % 512, None)
    expected = MODULES[kind]._product(codes, scale, weight, weight_scale, bias, torch.bfloat16)
    assert relative_error(out[tail], expected[: len(out[tail])]) <= 4e-3
