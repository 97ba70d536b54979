"""The sparse attention kernel with Hopper's instructions placed by hand, through Gluon (Triton 3.6).

While the probabilities of one block of keys are computed, the tensor cores multiply its predecessor's probabilities by
the values and the queries by its successor's keys; Triton's own pipeliner waits for the latter instead. It does not run
in the interpreter; the kernel of `sparse_attention.py` is its specification.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .linear_state import EPSILON
from .online_softmax import LOG2_E

# Triton 3.6's names, or the later ones
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _row(lists, tile, tiles, TILE: gl.constexpr, BLOCK_K: gl.constexpr):
    """The first row of a tile of keys; of any tile where there are no more."""
    block = gl.load(lists + tile // (BLOCK_K // TILE), mask=tile < tiles, other=0)
    return block * BLOCK_K + (tile % (BLOCK_K // TILE)) * TILE


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


@gluon.jit(do_not_specialize=["length", "kept"])
def _kernel(
    q,
    k,
    v,
    state,
    out,
    lists,
    key_sums,
    bias,
    length,
    kept,
    scale,
    epsilon,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):
    BLOCK_Q: gl.constexpr = q.block_type.shape[0]
    D: gl.constexpr = q.block_type.shape[1]
    TILE: gl.constexpr = k.block_type.shape[0]
    TILES: gl.constexpr = BLOCK_K // TILE
    DTYPE: gl.constexpr = q.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    OUT_COLUMNS: gl.constexpr = gl.SliceLayout(0, OUT)

    block = gl.program_id(0)
    head = gl.program_id(1)
    lists += (head * gl.num_programs(0) + block) * kept
    tiles = kept * TILES

    query = gl.allocate_shared_memory(DTYPE, [BLOCK_Q, D], q.layout)
    folded = gl.allocate_shared_memory(DTYPE, [D, D], state.layout)
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, D], k.layout)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, D], v.layout)
    once = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(once, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(slot), count=1)
        mbarrier.init(v_ready.index(slot), count=1)
    fence_async_shared()

    column = head * D
    TILE_BYTES: gl.constexpr = k.block_type.nbytes
    mbarrier.expect(once, q.block_type.nbytes + state.block_type.nbytes)
    for slot in gl.static_range(STAGES):
        mbarrier.expect(k_ready.index(slot), TILE_BYTES, pred=slot < tiles)
        mbarrier.expect(v_ready.index(slot), TILE_BYTES, pred=slot < tiles)
    _barrier()
    _load(q, [block * BLOCK_Q, column], once, query)
    _load(state, [column, 0], once, folded)
    for slot in gl.static_range(STAGES):
        row = _row(lists, slot, tiles, TILE, BLOCK_K)
        _load(k, [row, column], k_ready.index(slot), keys.index(slot), pred=slot < tiles)
        _load(v, [row, column], v_ready.index(slot), values.index(slot), pred=slot < tiles)
    mbarrier.wait(once, 0)
    mbarrier.wait(k_ready.index(0), 0)
    nothing = gl.zeros([BLOCK_Q, TILE], gl.float32, SCORES)
    logits = warpgroup_mma(query, keys.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(0, deps=[logits])
    row = _row(lists, STAGES, tiles, TILE, BLOCK_K)
    mbarrier.expect(k_ready.index(0), TILE_BYTES, pred=tiles > STAGES)
    _barrier()  # every warp is done with the slot
    _load(k, [row, column], k_ready.index(0), keys.index(0), pred=tiles > STAGES)

    top = gl.full([BLOCK_Q], -1e30, gl.float32, ROWS)
    total = gl.zeros([BLOCK_Q], gl.float32, ROWS)
    mixed = warpgroup_mma_init(gl.zeros([BLOCK_Q, D], gl.float32, OUT))
    for j in range(tiles - 1):
        ahead = j + 1
        mbarrier.wait(k_ready.index(ahead % STAGES), (ahead // STAGES) & 1)
        upcoming = warpgroup_mma(
            query, keys.index(ahead % STAGES).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        k_tile = ahead + STAGES  # takes the slot of the keys multiplied now
        v_tile = j - 1 + STAGES  # and the slot of the values multiplied last
        k_row = _row(lists, k_tile, tiles, TILE, BLOCK_K)
        v_row = _row(lists, v_tile, tiles, TILE, BLOCK_K)
        k_wanted = k_tile < tiles
        v_wanted = (j > 0) & (v_tile < tiles)
        if TILES > 1:  # noqa: SIM102 (known when compiled, the other is not)
            # the last block's first tile; its last one comes after the loop
            if ahead == tiles - 1:
                logits = _without_end(logits, gl.load(lists + kept - 1) * BLOCK_K, length, SCORES)
        p, top, total, decay = _softmax_step(logits, top, total, scale)
        # waiting for the values first keeps the assembler from moving the exponentials behind the products
        mbarrier.wait(v_ready.index(j % STAGES), (j // STAGES) & 1)
        mixed, logits = warpgroup_mma_wait(0, deps=[mixed, upcoming])
        mixed = mixed * gl.expand_dims(gl.convert_layout(decay, OUT_ROWS), 1)
        mixed = warpgroup_mma(gl.convert_layout(p.to(DTYPE), LEFT), values.index(j % STAGES), mixed, is_async=True)
        mbarrier.expect(k_ready.index(k_tile % STAGES), TILE_BYTES, pred=k_wanted)
        mbarrier.expect(v_ready.index(v_tile % STAGES), TILE_BYTES, pred=v_wanted)
        _barrier()  # every warp is done with both slots
        free = k_tile % STAGES
        _load(k, [k_row, column], k_ready.index(free), keys.index(free), pred=k_wanted)
        free = v_tile % STAGES
        _load(v, [v_row, column], v_ready.index(free), values.index(free), pred=v_wanted)

    last = tiles - 1
    start = gl.load(lists + kept - 1) * BLOCK_K + (TILES - 1) * TILE
    if start + TILE > length:
        logits = _without_end(logits, start, length, SCORES)
    p, top, total, decay = _softmax_step(logits, top, total, scale)
    mixed = warpgroup_mma_wait(0, deps=[mixed])
    mixed = mixed * gl.expand_dims(gl.convert_layout(decay, OUT_ROWS), 1)
    mbarrier.wait(v_ready.index(last % STAGES), (last // STAGES) & 1)
    mixed = warpgroup_mma(gl.convert_layout(p.to(DTYPE), LEFT), values.index(last % STAGES), mixed, is_async=True)
    mixed = warpgroup_mma_wait(0, deps=[mixed])
    result = mixed / gl.expand_dims(gl.convert_layout(total, OUT_ROWS), 1)

    # the linear branch, as `add_linear_branch`
    wide = query.load(OUT).to(gl.float32)
    phi = gl.exp2((wide - gl.expand_dims(gl.max(wide, axis=1), 1)) * 1.4426950408889634)
    phi = phi / gl.expand_dims(gl.sum(phi, axis=1), 1)
    columns = gl.arange(0, D, layout=OUT_COLUMNS)
    weight = gl.sum(phi * gl.expand_dims(gl.load(key_sums + head * D + columns), 0), axis=1) + epsilon
    phi = gl.convert_layout((phi / gl.expand_dims(weight, 1)).to(DTYPE), LEFT)
    result += gl.expand_dims(gl.load(bias + columns).to(DTYPE).to(gl.float32), 0)
    result = warpgroup_mma(phi, folded, result, is_async=True)
    result = warpgroup_mma_wait(0, deps=[result])

    query.store(result.to(DTYPE))
    fence_async_shared()
    _store(out, [block * BLOCK_Q, column], query)
    tma.store_wait(0)


def _describe(x: Tensor, rows: int) -> TensorDescriptor:
    """[L, H, D] in blocks [rows, D]."""
    length, heads, size = x.shape
    layout = gl.NVMMASharedLayout.get_default_for([rows, size], gl.bfloat16)  # of the type only its 16 bits count
    return TensorDescriptor(x, [length, heads * size], [x.stride(0), 1], [rows, size], layout)


def overlapped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    folded: Tensor,
    key_sums: Tensor,
    bias: Tensor,
    block_q: int,
    block_k: int,
    stages: int,
) -> Tensor:
    """`sparse_attention` on sm90, where the copy engine can read q, k and v.

    stages: tiles of keys and values on their way or in use, 2 or more.
    """
    tile = 64
    warps = block_q // 16
    length, heads, size = q.shape[1:]
    out = q.new_empty(q.shape)
    for b in range(q.shape[0]):
        _kernel[(triton.cdiv(length, block_q), heads)](
            _describe(q[b], block_q),
            _describe(k[b], tile),
            _describe(v[b], tile),
            _describe(folded[b].view(heads * size, 1, size), size),
            _describe(out[b], block_q),
            lists[b],
            key_sums[b],
            bias,
            length,
            lists.shape[-1],
            size**-0.5 * LOG2_E,
            EPSILON * size / length,
            block_k,
            stages,
            warps,
            num_warps=warps,
        )
    return out
