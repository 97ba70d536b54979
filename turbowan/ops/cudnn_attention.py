"""Sparse-linear attention with NVIDIA's block-sparse attention for its exact branch: the extra `cudnn`.

Needs `nvidia-cudnn-frontend` 1.32 or later, whose kernels are compiled at first use, and Hopper or a later GPU.
Selection and linear branch are our own kernels. On Hopper our own exact branch is faster (H200, 14B at 832x480, all of
the operation: 3.85 ms against 5.16), so there this one runs only where it is forced. On later GPUs neither is measured:
installing it means using it. Its interface: docs.nvidia.com/cudnn, "Block Sparse Attention (BSA)".
"""

from functools import cache
from importlib import import_module
from warnings import warn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Note
from .sparse_linear_attention import exact_branch
from .triton.linear_state import add_branch, linear_state
from .triton.online_softmax import heads_last
from .triton.sparse_linear_attention import selected_lists

BLOCK = 64  # tokens of its query and key blocks
_LARGEST_ERROR = 0.01  # of the self-test; 0.0023 was measured on an H200


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    topk_ratio: float,
    block_q: int,
    block_k: int,
    precision: str,
    q_means: Tensor | None = None,
    k_means: Tensor | None = None,
) -> Tensor:
    """As the eager twin, for query blocks of 64 or 128 and key blocks of 64, without SageSLA's rounding."""
    q, k, v = (heads_last(x) for x in (q, k, v))
    lists, _ = selected_lists(q, k, topk_ratio, block_q, block_k, q_means, k_means)
    return add_branch(_exact(q, k, v, lists, block_q), q, *linear_state(k, v, proj_weight), proj_bias)


def _exact(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, block_q: int) -> Tensor:
    """[B, L, H, D]: a map of larger query blocks is one of 64 with equal rows, and q is filled up to whole blocks."""
    forward = import_module("cudnn.block_sparse_attention").block_sparse_attention_forward
    length = q.shape[1]
    blocks = -(-length // BLOCK)
    rows = lists.repeat_interleave(block_q // BLOCK, dim=2)[:, :, :blocks].contiguous()
    sizes = None
    if length % BLOCK:
        q = F.pad(q, (0, 0, 0, 0, 0, -length % BLOCK))
        sizes = torch.full((blocks,), BLOCK, dtype=torch.int32, device=q.device)
        sizes[-1:].fill_(length % BLOCK)
    found = forward(q, k, v, rows, block_sizes=sizes, sparse_block_size=BLOCK, layout="bshd")
    return found["o_tensor"][:, :length]


@cache
def problem(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Why it cannot be used there, None where it can: tried once, and then said as a note.

    Random queries and lists that hold the short last block, against the eager twin in float32.
    """
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(3, 2, 330, 3, size, device=device, generator=generator).to(dtype).unbind(0)
    draws = torch.rand(2, 3, 3, 6, device=device, generator=generator)
    lists = draws.argsort(dim=-1)[..., :3].sort(dim=-1).values.to(torch.int32)
    try:
        ours = _exact(q, k, v, lists, 128).float()
    except Exception as failure:  # whatever its just-in-time compiler finds amiss
        return _noted(f"does not run here ({' '.join(str(failure).split())[:200]}); version 1.32 is known to")
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    expected = exact_branch(q, k, v, lists.long(), 128, BLOCK).transpose(1, 2)
    error = float((ours - expected).norm() / expected.norm())
    return None if error <= _LARGEST_ERROR else _noted(f"is off by {error:.3g} here, {_LARGEST_ERROR} is the most")


def _noted(why: str) -> str:
    warn(f"nvidia-cudnn-frontend's block-sparse attention {why}; it is not used", Note, stacklevel=2)
    return why
