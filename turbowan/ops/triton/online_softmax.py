"""What our attention kernels share: loads of a head's rows, and softmax a block of keys at a time, in base 2."""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1.4426950408889634


@triton.jit
def load_rows(x, row, column, length, stride, ROWS: tl.constexpr, D: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """[ROWS, D] of one sample from (row, column) on, zero past its end; x is a tensor descriptor or a pointer."""
    if DESCRIPTORS:
        tile = x.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        at = rows.to(tl.int64)[:, None] * stride + column + tl.arange(0, D)[None, :]
        tile = tl.load(x + at, mask=(rows < length)[:, None], other=0.0)
    return tile


@triton.jit
def attend(logits, values, top, total, mixed, scale):
    """One block of keys: `top` is the largest logit so far times scale, total and mixed the sums of 2^(logit - top).

    The scale (log2 e included, positive) enters with the subtraction: one fused multiply-add for each logit.
    """
    new_top = tl.maximum(top, tl.max(logits, axis=1) * scale)
    p = tl.exp2(logits * scale - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(p, axis=1)
    mixed = tl.dot(p.to(values.dtype), values, mixed * decay[:, None])
    return new_top, total, mixed


def rows_of(sample: Tensor, rows: int, columns: int, descriptors: bool) -> "Tensor | TensorDescriptor":
    """A sample [L, H, D] for `load_rows`: as a descriptor of [L, H * D] in blocks, which the copy engine reads."""
    if not descriptors:
        return sample
    length, heads, size = sample.shape
    return TensorDescriptor(sample, [length, heads * size], [sample.stride(0), 1], [rows, columns])


def can_describe(*tensors: Tensor) -> bool:
    """Whether the copy engine can read each sample of [B, L, H, D]: heads side by side, all aligned to 16 bytes."""
    return all(
        x.stride(2) == x.shape[3]
        and x.data_ptr() % 16 == 0
        and (x.stride(0) * x.element_size()) % 16 == 0
        and (x.stride(1) * x.element_size()) % 16 == 0
        for x in tensors
    )


def heads_last(x: Tensor) -> Tensor:
    """x itself where its last axis is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
