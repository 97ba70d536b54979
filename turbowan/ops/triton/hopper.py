"""What the kernels placed by hand share: whether they can be built, and names that Triton changed after 3.6."""

import triton

from . import INTERPRETED

HAS_GLUON = not INTERPRETED and tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)

if HAS_GLUON:
    try:
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.language.nvidia.hopper import tma

        barrier = getattr(gl, "barrier", None) or gl.thread_barrier
        copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
        copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    except (ImportError, AttributeError):  # experimental: a later Triton may place or name it differently
        HAS_GLUON = False
