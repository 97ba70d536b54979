"""The kernels' tables: an entry of its own for each generation of GPUs, none larger than what these have."""

import importlib

import pytest

pytest.importorskip("triton")
from turbowan.ops.triton import linear_state, matmul_int8, sage_attention, short_attention, sparse_attention

# KiB of shared memory that a program may have; the entry (8, 0) serves 8.6 and 8.9 too, which have less than 8.0
LIMITS = {(8, 0): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
NAMES = (
    "gelu_rows", "linear_state", "qk_norm_rope", "residual_norm", "rms_norm", "sage_attention", "short_attention",
    "sparse_attention",
)  # fmt: skip
SLACK = 2048  # barriers, and what reductions pass between warps


def entry(table, capability):
    return table[max(known for known in table if known <= capability)]


def fits(capability, *parts, programs=1):
    """Upper bounds by operands: what Triton 3.6 takes when it compiles for these GPUs is less or equal."""
    return programs * (sum(parts) + SLACK) <= LIMITS[capability] * 1024


@pytest.mark.parametrize("name", NAMES)
def test_no_generation_takes_anothers_entry_unsaid(name):
    table = importlib.import_module(f"turbowan.ops.triton.{name}").CONFIGS
    assert {(9, 0), (10, 0), (12, 0)} <= set(table)
    assert min(table) in ((8, 0), (8, 9))


@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("size", [64, 128])
def test_every_choice_fits_its_gpu(capability, size):
    state = 2 * size * size
    for config in entry(sparse_attention.CONFIGS, capability):
        if isinstance(config, sparse_attention.Config):
            loop = config.stages * 2 * 2 * config.tile * size
            assert fits(capability, 2 * config.rows * size, max(loop, state)), config
        else:  # queries, keys and values, the state, and results of two groups
            assert fits(capability, 2 * 128 * size, config.stages * 2 * 2 * 64 * size, state, 2 * 128 * size), config
    if capability >= (8, 9):
        for block_k, config in entry(sage_attention.CONFIGS, capability).items():
            loop = config.rows * size + config.stages * 2 * block_k * size
            assert fits(capability, max(loop, 2 * config.rows * size + state)), (block_k, config)
    config = entry(short_attention.CONFIGS, capability)
    assert fits(capability, 2 * config.block_q * size, config.stages * 2 * 2 * 64 * size), config
    config = entry(linear_state.CONFIGS, capability)
    assert fits(capability, max(config.stages * 2 * 2 * config.tile * size, 2 * state)), config


@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("kind", ["row", "block"])
def test_every_product_fits_its_gpu(capability, kind):
    for config in matmul_int8.CONFIGS[kind].get(capability, matmul_int8.CONFIGS[kind][8, 0]):
        if isinstance(config, matmul_int8.Config):
            slot = (config.block_m + config.block_n) * config.block_k
            assert fits(capability, config.num_stages * slot, programs=max(1, config.per_sm)), config
        else:  # and two halves of a tile of results
            assert fits(capability, config.stages * (128 + 256) * 128, 2 * 2 * 64 * 128), config
