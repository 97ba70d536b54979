"""Products of int8 rows: integer tensor cores, with scales, bias and activation in the epilogue.

One loop over tiles and, inside it, one over K; operands come by tensor descriptor (Hopper's copy engine) or by
pointers. The tile sizes are data: `CONFIGS` holds what was chosen, `candidates` what a sweep tries.

On Hopper Triton (3.6 and 3.9) ends every integer product before it starts the next one, where float products stay in
flight, so the tensor cores idle for a moment in each step of K. `hopper_matmul.py` avoids that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .hopper import HAS_GLUON


@dataclass(frozen=True)
class Config:
    """How a product is cut. K advances by `block_k`; scale blocks need 128.

    group: rows of tiles that are walked together, so that operands stay in the L2 cache. descriptors: operands by
    tensor descriptor. per_sm: programs per multiprocessor, each walking over many tiles; 0 = a program per tile.
    """

    block_m: int
    block_n: int
    block_k: int = 128
    num_warps: int = 8
    num_stages: int = 3
    group: int = 8
    descriptors: bool = True
    per_sm: int = 1


@dataclass(frozen=True)
class HopperConfig:
    """How `hopper_matmul.py` cuts a product: its tiles are 128 x 256, its steps 128.

    stages: steps of K in flight, 48 KiB of shared memory each; group: as above.
    """

    stages: int = 4
    group: int = 8


# By what is scaled and by compute capability, in order of preference: the first that can run does. (8, 0) serves all
# capabilities that are not named, and needs less than 99 KiB of shared memory; not measured.
CONFIGS: dict[str, dict[tuple[int, int], tuple[Config | HopperConfig, ...]]] = {
    "row": {
        (9, 0): (HopperConfig(group=16), Config(128, 128, num_warps=4, per_sm=2)),
        (8, 0): (Config(128, 128, 64, num_stages=4, descriptors=False, per_sm=0),),
    },
    "block": {
        (9, 0): (HopperConfig(group=16), Config(128, 128, num_stages=4)),
        (8, 0): (Config(128, 64, num_warps=4, descriptors=False, per_sm=0),),
    },
}


def candidates(kind: str) -> list[Config | HopperConfig]:
    """What a sweep tries on Hopper, in order of expected merit; kind: "row" or "block"."""
    hopper = [HopperConfig(), HopperConfig(group=16), HopperConfig(group=4), HopperConfig(stages=3)]
    if kind == "row":
        return [
            *hopper,
            Config(256, 128),
            Config(128, 256, 256, num_stages=2),
            Config(128, 128, num_warps=4, per_sm=2),
            Config(256, 128, num_stages=4, group=16),
            Config(256, 128, descriptors=False),
        ]
    return [
        *hopper,
        Config(128, 128, num_stages=4),
        Config(128, 128, num_stages=5, group=16),
        Config(128, 64, num_warps=4, per_sm=3),
        Config(128, 128, descriptors=False),
    ]


@triton.jit
def _corner(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile: GROUP rows of tiles are walked down before the next column."""
    across = tl.cdiv(N, BN)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    inside = tile % (GROUP * across)
    return (first + inside % height) * BM, inside // height * BN


@triton.jit
def _codes(x, row, column, ROWS, COLUMNS, BR: tl.constexpr, BC: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """A block of codes [BR, BC], zero outside the matrix."""
    if DESCRIPTORS:
        return x.load([row, column])
    else:
        rows = row + tl.arange(0, BR)[:, None]
        columns = column + tl.arange(0, BC)[None, :]
        inside = (rows < ROWS) & (columns < COLUMNS)
        return tl.load(x + rows.to(tl.int64) * COLUMNS + columns, mask=inside, other=0)


@triton.jit
def _scales(x, start, COUNT, BLOCK: tl.constexpr):
    index = start + tl.arange(0, BLOCK)
    return tl.load(x + index, mask=index < COUNT, other=0.0)


@triton.jit
def gelu_tanh(x):
    """x * sigmoid(2 u), which is x / 2 * (1 + tanh(u))."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _write(
    part, bias, out, row, column, M, N, BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr
):
    """float32 [BM, BN] -> bias, one rounding, activation -> its place in the result."""
    if BIAS:
        part += _scales(bias, column, N, BN).to(tl.float32)[None, :]
    DTYPE: tl.constexpr = out.dtype.element_ty
    part = part.to(DTYPE)
    if GELU:
        part = gelu_tanh(part.to(tl.float32)).to(DTYPE)
    rows = row + tl.arange(0, BM)[:, None]
    columns = column + tl.arange(0, BN)[None, :]
    tl.store(out + rows.to(tl.int64) * N + columns, part, mask=(rows < M) & (columns < N))


@triton.jit
def _row_kernel(
    a, b, a_scale, b_scale, bias, out, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BIAS: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """out = (a b^T) * a_scale * b_scale + bias, with an integer sum over all of K."""
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column = _corner(tile, M, N, BM, BN, GROUP)
        total = tl.zeros((BM, BN), tl.int32)
        for k in range(0, K, BK):
            left = _codes(a, row, k, M, K, BM, BK, DESCRIPTORS)
            right = _codes(b, column, k, N, K, BN, BK, DESCRIPTORS)
            total = tl.dot(left, right.T, total, out_dtype=tl.int32)
        rows = _scales(a_scale, row, M, BM)[:, None]
        scaled = total.to(tl.float32) * rows * _scales(b_scale, column, N, BN)[None, :]
        _write(scaled, bias, out, row, column, M, N, BM, BN, BIAS, GELU)


@triton.jit
def _block_kernel(
    a, b, a_scale, b_scale, bias, out, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BIAS: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """out = sum over k of (a_k b_k^T) * a_scale * b_scale + bias; a tile lies inside one block of scales each way."""
    tl.static_assert(BK == 128 and BM <= 128 and BN <= 128)
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    steps = tl.cdiv(K, BK)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column = _corner(tile, M, N, BM, BN, GROUP)
        left_scale = a_scale + row // BK * steps
        right_scale = b_scale + column // BK * steps
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(steps):
            scale = tl.load(left_scale + k) * tl.load(right_scale + k)
            left = _codes(a, row, k * BK, M, K, BM, BK, DESCRIPTORS)
            right = _codes(b, column, k * BK, N, K, BN, BK, DESCRIPTORS)
            total += tl.dot(left, right.T, out_dtype=tl.int32).to(tl.float32) * scale
        _write(total, bias, out, row, column, M, N, BM, BN, BIAS, GELU)


def product_int8_rowwise(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
    config: Config | HopperConfig | None = None,
) -> Tensor:
    """int8 [M, K] and [N, K], float32 [M, 1] and [N], [N] or None -> [M, N] in `dtype`."""
    return _product("row", codes, scale, weight, weight_scale, bias, dtype, activation, config)


def product_int8_blockwise(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
    config: Config | HopperConfig | None = None,
) -> Tensor:
    """int8 [M, K] and [N, K], float32 [m, k] and [n, k] per 128 x 128 block, [N] or None -> [M, N] in `dtype`."""
    return _product("block", codes, scale, weight, weight_scale, bias, dtype, activation, config)


def _product(
    kind: str,
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str,
    config: Config | HopperConfig | None,
) -> Tensor:
    codes, scale, weight, weight_scale = (x.contiguous() for x in (codes, scale, weight, weight_scale))
    out = torch.empty((codes.shape[0], weight.shape[0]), dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    gelu = activation == "gelu_tanh"
    config = config or _choose(kind, codes, weight, out)
    if isinstance(config, HopperConfig):
        from .hopper_matmul import product  # Triton has what it needs from 3.6 on

        product(kind == "block", codes, scale, weight, weight_scale, bias, out, gelu, config)
    else:
        _launch(kind, codes, scale, weight, weight_scale, bias, out, gelu, config)
    return out


def _choose(kind: str, codes: Tensor, weight: Tensor, out: Tensor) -> Config | HopperConfig:
    capability = torch.cuda.get_device_capability(codes.device) if codes.is_cuda else (9, 0)
    known = CONFIGS[kind].get(capability, CONFIGS[kind][8, 0])
    hopper = codes.is_cuda and HAS_GLUON and out.itemsize == 2 and all(_describable(x) for x in (codes, weight, out))
    return next(config for config in known if hopper or isinstance(config, Config))


def _launch(
    kind: str,
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    gelu: bool,
    config: Config,
) -> None:
    (m, k), n = codes.shape, weight.shape[0]
    describe = config.descriptors and _describable(codes) and _describable(weight)
    left, right = codes, weight
    if describe:
        left = TensorDescriptor.from_tensor(codes, [config.block_m, config.block_k])
        right = TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k])
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    programs = min(tiles, config.per_sm * _multiprocessors(codes)) or tiles
    kernel = _row_kernel if kind == "row" else _block_kernel
    kernel[(programs,)](
        left, right, scale, weight_scale, bias, out, m, n, k,
        config.block_m, config.block_n, config.block_k, config.group, describe,
        bias is not None, gelu, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _describable(x: Tensor) -> bool:
    """Whether the copy engine can read and write this contiguous matrix: rows and start on multiples of 16 bytes."""
    return x.shape[1] * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
