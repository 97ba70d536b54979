"""Sparse-linear attention with NVIDIA's block-sparse attention for its exact branch: the extra `cudnn`.

Needs `nvidia-cudnn-frontend` 1.32 or later, whose kernels are compiled at first use, and Hopper or a later GPU.
Selection and linear branch are our own kernels. On Hopper ours are faster altogether (an H200, 14B at 832x480: 3.6 ms
with the linear branch added; 3.9 were measured for its exact branch alone before this file was written), so there it
runs only where it is forced. On later GPUs neither is measured: installing it means using it. This file itself has run
on a CPU only, against a stand-in. Its interface: docs.nvidia.com/cudnn, "Block Sparse Attention (BSA)".
"""

from functools import cache
from importlib import import_module
from warnings import warn

import torch
import torch.nn.functional as F
from torch import Tensor

from .sparse_linear_attention import exact_branch
from .triton.linear_state import add_branch, linear_state
from .triton.online_softmax import heads_last
from .triton.sparse_linear_attention import selected_lists
from .triton.sparse_linear_attention import sparse_linear_attention as by_triton

_BLOCK = 64  # tokens of its query and key blocks
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
    """As the eager twin, for key blocks of 64 without SageSLA's rounding; our own kernels take the rest.

    They also take over, with a warning, where the package has no such attention or computes something wrong.
    """
    arguments = (q, k, v, proj_weight, proj_bias, topk_ratio, block_q, block_k, precision, q_means, k_means)
    fits = precision == "bf16" and block_k == _BLOCK and block_q in (64, 128)
    if not fits or not _is_right(q.device, q.dtype, q.shape[-1]):
        return by_triton(*arguments)
    q, k, v = (heads_last(x) for x in (q, k, v))
    lists, _ = selected_lists(q, k, topk_ratio, block_q, block_k, q_means, k_means)
    return add_branch(_exact(q, k, v, lists, block_q), q, *linear_state(k, v, proj_weight), proj_bias)


def _exact(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, block_q: int) -> Tensor:
    """[B, L, H, D]: a map of larger query blocks is one of 64 with equal rows, and q is filled up to whole blocks."""
    forward = import_module("cudnn.block_sparse_attention").block_sparse_attention_forward
    length = q.shape[1]
    blocks = -(-length // _BLOCK)
    rows = lists.repeat_interleave(block_q // _BLOCK, dim=2)[:, :, :blocks].contiguous()
    sizes = None
    if length % _BLOCK:
        q = F.pad(q, (0, 0, 0, 0, 0, -length % _BLOCK))
        sizes = torch.full((blocks,), _BLOCK, dtype=torch.int32, device=q.device)
        sizes[-1:].fill_(length % _BLOCK)
    found = forward(q, k, v, rows, block_sizes=sizes, sparse_block_size=_BLOCK, layout="bshd")
    return found["o_tensor"][:, :length]


@cache
def _is_right(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Tried once: random queries, lists that hold the short last block, against the eager twin in float32."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(3, 2, 330, 3, size, device=device, generator=generator).to(dtype).unbind(0)
    draws = torch.rand(2, 3, 3, 6, device=device, generator=generator)
    lists = draws.argsort(dim=-1)[..., :3].sort(dim=-1).values.to(torch.int32)
    try:
        ours = _exact(q, k, v, lists, 128).float()
    except Exception as failure:  # whatever its just-in-time compiler finds amiss
        return _no(f"does not run here ({' '.join(str(failure).split())[:200]}); version 1.32 is known to")
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    expected = exact_branch(q, k, v, lists.long(), 128, _BLOCK).transpose(1, 2)
    error = float((ours - expected).norm() / expected.norm())
    return error <= _LARGEST_ERROR or _no(f"is off by {error:.3g} here, at most {_LARGEST_ERROR} is expected")


def _no(why: str) -> bool:
    warn(f"nvidia-cudnn-frontend's block-sparse attention {why}; our own kernel runs instead", stacklevel=2)
    return False
