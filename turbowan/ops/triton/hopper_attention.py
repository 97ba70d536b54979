"""The sparse attention kernel on Hopper with a loading warp and two groups that share each tile of keys and values.

Written in Gluon (Triton 3.6), for query blocks of 128 rows, 64 for each group of four warps. One group's softmax runs
while the other's products do. Queries stay in registers, so that a product reads only keys or values from shared
memory. Programs walk over (head, block): the next block's loads do not wait for this
one's end. It does not run in the interpreter; the kernel of `sparse_attention.py` is its specification.

On an H200, 14B at 832x480: 3.6 ms, 620 TFLOP/s, where programs of 64 rows for themselves take 4.4.
"""

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
from .linear_state import EPSILON
from .online_softmax import LOG2_E


@gluon.jit
def _load(q, k, v, state, lists, shared, length, kept, items, BLOCK_K: gl.constexpr):
    """The loading warp. A block's stages hold its first keys; next keys with the values before; its last values."""
    keys, values, queries, folded, _, full, empty, q_full, q_empty, state_full, state_empty = shared
    STAGES: gl.constexpr = keys.shape[0]
    TILE: gl.constexpr = keys.shape[1]
    D: gl.constexpr = keys.shape[2]
    TILES: gl.constexpr = BLOCK_K // TILE
    HEIGHT: gl.constexpr = queries.shape[1]
    TILE_BYTES: gl.constexpr = k.block_type.nbytes
    blocks = gl.cdiv(length, 2 * HEIGHT)
    tiles = kept * TILES
    count = 0  # of stages, over all blocks
    turn = 0  # of blocks
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        column = item // blocks * D
        for group in gl.static_range(2):
            mbarrier.wait(q_empty.index(group), turn ^ 1)
            mbarrier.expect(q_full.index(group), q.block_type.nbytes)
            row = item % blocks * (2 * HEIGHT) + group * HEIGHT
            copy_in(q, [row, column], q_full.index(group), queries.index(group))
        row = 0
        for j in range(tiles + 1):
            wanted = j < tiles
            ahead = gl.load(lists + item * kept + j // TILES, mask=wanted, other=0) * BLOCK_K + j % TILES * TILE
            stage = count % STAGES
            arrived = full.index(stage)
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)  # the first round finds all stages empty
            both = wanted & (j > 0)
            mbarrier.expect(arrived, 2 * TILE_BYTES, pred=both)
            mbarrier.expect(arrived, TILE_BYTES, pred=both ^ True)
            copy_in(k, [ahead, column], arrived, keys.index(stage), pred=wanted)
            copy_in(v, [row, column], arrived, values.index(stage), pred=j > 0)
            row = ahead
            count += 1
        mbarrier.wait(state_empty, turn ^ 1)
        mbarrier.expect(state_full, state.block_type.nbytes)
        copy_in(state, [column, 0], state_full, folded)
        turn ^= 1


@gluon.jit
def _softmax_step(logits, top, total, scale):
    new_top = gl.maximum(top, gl.max(logits, axis=1) * scale)
    p = gl.exp2(logits * scale - gl.expand_dims(new_top, 1))
    decay = gl.exp2(top - new_top)
    return p, new_top, total * decay + gl.sum(p, axis=1), decay


@gluon.jit
def _without_end(logits, start, length, LAYOUT: gl.constexpr):
    position = start + gl.arange(0, logits.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    return gl.where(gl.expand_dims(position < length, 0), logits, -1e30)


@gluon.jit
def _attend(
    out, lists, key_sums, bias, shared, length, kept, items, scale, epsilon,
    WHICH: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """A group of four warps: WHICH half of each query block."""
    keys, values, queries, folded, places, full, empty, q_full, q_empty, state_full, state_empty = shared
    STAGES: gl.constexpr = keys.shape[0]
    TILE: gl.constexpr = keys.shape[1]
    D: gl.constexpr = keys.shape[2]
    TILES: gl.constexpr = BLOCK_K // TILE
    HEIGHT: gl.constexpr = queries.shape[1]
    DTYPE: gl.constexpr = keys.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    QUERIES: gl.constexpr = gl.DotOperandLayout(0, SCORES, k_width=2)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    blocks = gl.cdiv(length, 2 * HEIGHT)
    tiles = kept * TILES
    nothing = gl.zeros([HEIGHT, TILE], gl.float32, SCORES)
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
    place = places.index(WHICH)
    count = 0  # of stages, over all blocks
    turn = 0  # of blocks
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head = item // blocks
        end = gl.load(lists + item * kept + kept - 1) * BLOCK_K  # where the last block of keys starts
        mbarrier.wait(q_full.index(WHICH), turn)
        query = queries.index(WHICH).load(QUERIES)
        mbarrier.arrive(q_empty.index(WHICH))

        stage = count % STAGES
        mbarrier.wait(full.index(stage), count // STAGES & 1)
        logits = warpgroup_mma(query, keys.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(0, deps=[logits])
        mbarrier.arrive(empty.index(stage))
        count += 1
        if end + TILE > length:  # noqa: SIM102 (kept apart, the assembler branches around it)
            if tiles <= TILES:
                logits = _without_end(logits, end, length, SCORES)
        top = gl.full([HEIGHT], -1e30, gl.float32, ROWS)
        total = gl.zeros([HEIGHT], gl.float32, ROWS)
        p, top, total, decay = _softmax_step(logits, top, total, scale)
        p = gl.convert_layout(p.to(DTYPE), LEFT)
        mixed = gl.zeros([HEIGHT, D], gl.float32, OUT)

        stage = count % STAGES
        mbarrier.wait(full.index(stage), count // STAGES & 1)
        for j in range(1, tiles):
            logits = warpgroup_mma(query, keys.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            mixed = warpgroup_mma(p, values.index(stage), mixed, is_async=True)
            logits = warpgroup_mma_wait(1, deps=[logits])
            start = end + (j - (tiles - TILES)) * TILE  # of this tile, where it belongs to the last block
            if start + TILE > length:  # noqa: SIM102
                if j >= tiles - TILES:
                    logits = _without_end(logits, start, length, SCORES)
            weights, top, total, decay = _softmax_step(logits, top, total, scale)
            weights = weights.to(DTYPE)
            done = stage
            count += 1
            stage = count % STAGES
            # waiting for the next tiles first keeps the assembler from moving the exponentials behind the products
            mbarrier.wait(full.index(stage), count // STAGES & 1)
            mixed = warpgroup_mma_wait(0, deps=[mixed])
            mbarrier.arrive(empty.index(done))
            mixed = mixed * gl.expand_dims(gl.convert_layout(decay, OUT_ROWS), 1)
            p = gl.convert_layout(weights, LEFT)

        mixed = warpgroup_mma(p, values.index(stage), mixed, is_async=True)
        # the linear branch, as `add_linear_branch`, while the last values are multiplied
        wide = gl.convert_layout(query, OUT).to(gl.float32)
        phi = gl.exp2((wide - gl.expand_dims(gl.max(wide, axis=1), 1)) * 1.4426950408889634)
        phi = phi / gl.expand_dims(gl.sum(phi, axis=1), 1)
        weight = gl.sum(phi * gl.expand_dims(gl.load(key_sums + head * D + columns), 0), axis=1) + epsilon
        phi = gl.convert_layout((phi / gl.expand_dims(weight, 1)).to(DTYPE), LEFT)
        mixed = warpgroup_mma_wait(0, deps=[mixed])
        mbarrier.arrive(empty.index(stage))
        count += 1
        result = mixed / gl.expand_dims(gl.convert_layout(total, OUT_ROWS), 1)
        result += gl.expand_dims(gl.load(bias + columns).to(DTYPE).to(gl.float32), 0)
        mbarrier.wait(state_full, turn)
        result = warpgroup_mma(phi, folded, result, is_async=True)
        result = warpgroup_mma_wait(0, deps=[result])
        mbarrier.arrive(state_empty)
        turn ^= 1

        tma.store_wait(0)  # the copy engine has read the block before
        barrier()
        place.store(result.to(DTYPE))
        fence_async_shared()
        barrier()
        copy_out(out, [item % blocks * (2 * HEIGHT) + WHICH * HEIGHT, head * D], place)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["length", "kept", "items"])
def _kernel(
    q, k, v, state, out, lists, key_sums, bias, length, kept, items, scale, epsilon,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    HEIGHT: gl.constexpr = q.block_type.shape[0]
    D: gl.constexpr = q.block_type.shape[1]
    TILE: gl.constexpr = k.block_type.shape[0]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    keys = gl.allocate_shared_memory(q.dtype, [STAGES, TILE, D], k.layout)
    values = gl.allocate_shared_memory(q.dtype, [STAGES, TILE, D], v.layout)
    queries = gl.allocate_shared_memory(q.dtype, [2, HEIGHT, D], q.layout)
    places = gl.allocate_shared_memory(q.dtype, [2, HEIGHT, D], out.layout)
    folded = gl.allocate_shared_memory(q.dtype, [D, D], state.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    state_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    state_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # both groups have read it
    for group in gl.static_range(2):
        mbarrier.init(q_full.index(group), count=1)
        mbarrier.init(q_empty.index(group), count=1)
    mbarrier.init(state_full, count=1)
    mbarrier.init(state_empty, count=2)
    fence_async_shared()
    shared = (keys, values, queries, folded, places, full, empty, q_full, q_empty, state_full, state_empty)
    gl.warp_specialize(
        [
            (_attend, (out, lists, key_sums, bias, shared, length, kept, items, scale, epsilon, 0, BLOCK_K)),
            (_attend, (out, lists, key_sums, bias, shared, length, kept, items, scale, epsilon, 1, BLOCK_K)),
            (_load, (q, k, v, state, lists, shared, length, kept, items, BLOCK_K)),
        ],
        [4, 1],
        [240, 24],  # registers a thread of the second group and of the loading warp
    )


def _describe(x: Tensor, rows: int) -> TensorDescriptor:
    """[L, H, D] in blocks [rows, D]."""
    length, heads, size = x.shape
    layout = gl.NVMMASharedLayout.get_default_for([rows, size], gl.bfloat16)  # of the type only its 16 bits count
    return TensorDescriptor(x, [length, heads * size], [x.stride(0), 1], [rows, size], layout)


def attention(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, folded: Tensor, key_sums: Tensor, bias: Tensor,
    block_k: int, stages: int,
) -> Tensor:  # fmt: skip
    """`sparse_attention` on sm90 for query blocks of 128, where the copy engine can read q, k and v.

    stages: tiles of 64 keys and values on their way or in use, 2 to 4.
    """
    tile = 64
    length, heads, size = q.shape[1:]
    items = triton.cdiv(length, 128) * heads
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    out = q.new_empty(q.shape)
    for b in range(q.shape[0]):
        _kernel[(min(items, processors),)](
            _describe(q[b], tile),
            _describe(k[b], tile),
            _describe(v[b], tile),
            _describe(folded[b].view(heads * size, 1, size), size),
            _describe(out[b], tile),
            lists[b],
            key_sums[b],
            bias,
            length,
            lists.shape[-1],
            items,
            size**-0.5 * LOG2_E,
            EPSILON * size / length,
            block_k,
            stages,
            num_warps=4,
            maxnreg=168,
        )
    return out
