"""Products of int8 rows on Hopper (compute capability 9.0): one warp loads, two groups of four warps multiply.

Written in Gluon, in names that Triton 3.6 to 3.9 know. Unlike in the loop that Triton makes of `matmul_int8.py`, an
integer product stays in flight while the next one is started, the groups need not wait for each other, and where blocks
are scaled one group scales while the other keeps the tensor cores busy.

A tile is 128 rows by 256 columns: 64 rows of it for each group, so a tile has one row of scale blocks and two columns.
Results are of two bytes; rows of codes and results start on multiples of 16 bytes, as the copy engine wants it.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper import barrier, copy_in, copy_out
from .matmul_int8 import HopperConfig

ROWS, COLUMNS, STEP = 128, 256, 128  # of a tile; of K per step


@gluon.jit
def _corner(tile, M, N, GROUP: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """First row and column of a tile: GROUP rows of tiles are walked down before the next column."""
    across = gl.cdiv(N, COLUMNS)
    first = tile // (GROUP * across) * GROUP
    height = gl.minimum(gl.cdiv(M, ROWS) - first, GROUP)
    inside = tile % (GROUP * across)
    return (first + inside % height) * ROWS, inside // height * COLUMNS


@gluon.jit
def _load(a, b, shared, M, N, steps, GROUP: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """The loading warp: fills a slot as soon as both groups have read what was in it."""
    a_slots, b_slots, _, full, empty = shared
    STAGES: gl.constexpr = b_slots.shape[0]
    count = 0  # of steps, over all tiles
    for tile in range(gl.program_id(0), gl.cdiv(M, ROWS) * gl.cdiv(N, COLUMNS), gl.num_programs(0)):
        row, column = _corner(tile, M, N, GROUP, ROWS, COLUMNS)
        for k in range(steps):
            slot = count % STAGES
            mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)  # the first round finds all slots empty
            arrived = full.index(slot)
            mbarrier.expect(arrived, 2 * a.block_type.nbytes + b.block_type.nbytes)
            copy_in(a, [row, k * 128], arrived, a_slots.index(2 * slot))
            copy_in(a, [row + ROWS // 2, k * 128], arrived, a_slots.index(2 * slot + 1))
            copy_in(b, [column, k * 128], arrived, b_slots.index(slot))
            count += 1


@gluon.jit
def _of_columns(x, column, N, LAYOUT: gl.constexpr, COUNT: gl.constexpr):
    """COUNT values from `column` on, as a row of a tile in LAYOUT."""
    index = column + gl.arange(0, COUNT, layout=gl.SliceLayout(0, LAYOUT))
    return gl.load(x + index, mask=index < N, other=0.0).to(gl.float32)[None, :]


@gluon.jit
def _finish(part, dtype: gl.constexpr, GELU: gl.constexpr):
    part = part.to(dtype)
    if GELU:  # x / 2 * (1 + tanh(u)) = x * sigmoid(2 u)
        x = part.to(gl.float32)
        part = (x / (1.0 + gl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))).to(dtype)
    return part


@gluon.jit
def _store(part, out, place, row, column):
    """Leave half a group's tile to the copy engine, once it has read the half before."""
    tma.store_wait(0)
    barrier()
    place.store(part)
    fence_async_shared()
    barrier()
    copy_out(out, [row, column], place)


@gluon.jit
def _row_tiles(
    common, bias, WHICH: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr, GELU: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """A multiplying group, scales per row and column: an integer sum over all of K."""
    a_scale, b_scale, out, shared, M, N, steps = common
    a_slots, b_slots, places, full, empty = shared
    STAGES: gl.constexpr = b_slots.shape[0]
    HEIGHT: gl.constexpr = ROWS // 2
    HALF: gl.constexpr = COLUMNS // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    place = places.index(WHICH)
    count = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, ROWS) * gl.cdiv(N, COLUMNS), gl.num_programs(0)):
        row, column = _corner(tile, M, N, GROUP, ROWS, COLUMNS)
        row += WHICH * HEIGHT
        total = gl.zeros((HEIGHT, COLUMNS), gl.int32, layout=LAYOUT)
        for k in range(steps):
            slot = count % STAGES
            mbarrier.wait(full.index(slot), count // STAGES & 1)
            left = a_slots.index(2 * slot + WHICH)
            right = b_slots.index(slot).permute((1, 0))
            total = warpgroup_mma(left, right, total, use_acc=k > 0, is_async=True)
            total = warpgroup_mma_wait(1, (total,))  # the step before has been read: its slot is free
            mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), pred=k > 0)
            count += 1
        index = row + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, LAYOUT))
        rows = gl.load(a_scale + index, mask=index < M, other=0.0)[:, None]
        columns = _of_columns(b_scale, column, N, LAYOUT, HALF)
        total = warpgroup_mma_wait(0, (total,))
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES))
        first, second = gl.split(gl.permute(gl.reshape(total, (HEIGHT, 2, HALF)), (0, 2, 1)))
        first = gl.convert_layout(first, LAYOUT).to(gl.float32) * rows * columns
        if BIAS:
            first += _of_columns(bias, column, N, LAYOUT, HALF)
        columns = _of_columns(b_scale, column + HALF, N, LAYOUT, HALF)
        _store(_finish(first, out.dtype, GELU), out, place, row, column)
        second = gl.convert_layout(second, LAYOUT).to(gl.float32) * rows * columns
        if BIAS:
            second += _of_columns(bias, column + HALF, N, LAYOUT, HALF)
        _store(_finish(second, out.dtype, GELU), out, place, row, column + HALF)
    tma.store_wait(0)


@gluon.jit
def _block_tiles(
    common, bias, WHICH: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr, GELU: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """A multiplying group, scales per block: each step's integer product is scaled and added in float32.

    The two halves of the columns take turns, so that one set of integer registers serves both; meanwhile the other
    group multiplies.
    """
    a_scale, b_scale, out, shared, M, N, steps = common
    a_slots, b_slots, places, full, empty = shared
    STAGES: gl.constexpr = b_slots.shape[0]
    HEIGHT: gl.constexpr = ROWS // 2
    HALF: gl.constexpr = COLUMNS // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    place = places.index(WHICH)
    zero = gl.zeros((HEIGHT, HALF), gl.int32, layout=LAYOUT)
    last_column = gl.cdiv(N, HALF) - 1
    count = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, ROWS) * gl.cdiv(N, COLUMNS), gl.num_programs(0)):
        row, column = _corner(tile, M, N, GROUP, ROWS, COLUMNS)
        row_scale = a_scale + row // ROWS * steps
        first_scale = b_scale + column // HALF * steps
        second_scale = b_scale + gl.minimum(column // HALF + 1, last_column) * steps
        row += WHICH * HEIGHT
        first = gl.zeros((HEIGHT, HALF), gl.float32, layout=LAYOUT)
        second = gl.zeros((HEIGHT, HALF), gl.float32, layout=LAYOUT)
        for k in range(steps):
            slot = count % STAGES
            scale = gl.load(row_scale + k)
            scale_first = scale * gl.load(first_scale + k)
            scale_second = scale * gl.load(second_scale + k)
            mbarrier.wait(full.index(slot), count // STAGES & 1)
            left = a_slots.index(2 * slot + WHICH)
            right = b_slots.index(slot)
            product = warpgroup_mma(
                left, right.slice(0, HALF, 0).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            product = warpgroup_mma_wait(0, (product,))
            first += product.to(gl.float32) * scale_first
            product = warpgroup_mma(
                left, right.slice(HALF, HALF, 0).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            product = warpgroup_mma_wait(0, (product,))
            mbarrier.arrive(empty.index(slot))
            second += product.to(gl.float32) * scale_second
            count += 1
        if BIAS:
            first += _of_columns(bias, column, N, LAYOUT, HALF)
            second += _of_columns(bias, column + HALF, N, LAYOUT, HALF)
        _store(_finish(first, out.dtype, GELU), out, place, row, column)
        _store(_finish(second, out.dtype, GELU), out, place, row, column + HALF)
    tma.store_wait(0)


@gluon.jit
def _multiply(
    common, bias, WHICH: gl.constexpr, BLOCKS: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr,
    GELU: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    if BLOCKS:
        _block_tiles(common, bias, WHICH, GROUP, BIAS, GELU, ROWS, COLUMNS)
    else:
        _row_tiles(common, bias, WHICH, GROUP, BIAS, GELU, ROWS, COLUMNS)


@gluon.jit
def _kernel(
    a, b, a_scale, b_scale, bias, out, M, N, K,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr, GELU: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    a_slots = gl.allocate_shared_memory(a.dtype, [2 * STAGES, ROWS // 2, 128], a.layout)
    b_slots = gl.allocate_shared_memory(b.dtype, [STAGES, COLUMNS, 128], b.layout)
    places = gl.allocate_shared_memory(out.dtype, [2, ROWS // 2, COLUMNS // 2], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)  # both groups have read it
    fence_async_shared()
    shared = (a_slots, b_slots, places, full, empty)
    steps = gl.cdiv(K, 128)
    common = (a_scale, b_scale, out, shared, M, N, steps)
    gl.warp_specialize(
        [
            (_multiply, (common, bias, 0, BLOCKS, GROUP, BIAS, GELU, ROWS, COLUMNS)),
            (_multiply, (common, bias, 1, BLOCKS, GROUP, BIAS, GELU, ROWS, COLUMNS)),
            (_load, (a, b, shared, M, N, steps, GROUP, ROWS, COLUMNS)),
        ],
        [4, 1],
        [240, 24],
    )


def product(
    blocks: bool,
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    gelu: bool,
    config: HopperConfig,
) -> None:
    """Fill out [M, N] from int8 [M, K] and [N, K], scales per 128 x 128 block or per row and column; all contiguous."""
    (m, k), n = codes.shape, weight.shape[0]
    tiles = triton.cdiv(m, ROWS) * triton.cdiv(n, COLUMNS)
    programs = min(tiles, torch.cuda.get_device_properties(codes.device).multi_processor_count)
    _kernel[(programs,)](
        _describe(codes, ROWS // 2, STEP), _describe(weight, COLUMNS, STEP), scale, weight_scale, bias,
        _describe(out, ROWS // 2, COLUMNS // 2), m, n, k,
        blocks, config.stages, config.group, bias is not None, gelu, ROWS, COLUMNS,
        num_warps=4, maxnreg=168,
    )  # fmt: skip


def _describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    kind = {torch.int8: gl.int8, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    return TensorDescriptor.from_tensor(x, [rows, columns], gl.NVMMASharedLayout.get_default_for([rows, columns], kind))
