"""The kernels that are placed by hand: whether they can be built with this Triton, and where they are chosen."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import triton

from turbowan.ops import triton as kernels
from turbowan.ops.triton import hopper, matmul_int8, sparse_attention


def has_gluon():
    """What the module says when it is loaded afresh."""
    spec = importlib.util.spec_from_file_location(f"{kernels.__name__}.hopper_again", hopper.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HAS_GLUON


def test_gluon_is_asked_for(monkeypatch):
    """Experimental names: a Triton without them is no error, Triton's own loop runs instead."""
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert not has_gluon()
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    assert not has_gluon()
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    assert not has_gluon()


def on_gpu(*shape, dtype=torch.bfloat16, heads_apart=False, offset=0):
    """What selection looks at of a tensor on a GPU."""
    x = torch.empty(shape)
    strides = x.transpose(1, 2).contiguous().transpose(1, 2).stride() if heads_apart else x.stride()
    return SimpleNamespace(
        shape=torch.Size(shape), dtype=dtype, itemsize=dtype.itemsize, is_cuda=True, device=torch.device("cuda"),
        stride=lambda axis: strides[axis], element_size=lambda: dtype.itemsize, data_ptr=lambda: 1024 + offset,
    )  # fmt: skip


@pytest.mark.parametrize("gluon", [True, False])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("how", [{}, {"heads_apart": True}, {"offset": 8}])
def test_where_sparse_attention_takes_it(gluon, capability, block_q, how, monkeypatch):
    """On sm90 alone, for query blocks of 128, and where the copy engine can read q, k and v."""
    monkeypatch.setattr(sparse_attention, "HAS_GLUON", gluon)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    plain = on_gpu(1, 256, 3, 128)
    by_hand = gluon and capability == (9, 0) and block_q == 128
    for place in range(3):
        qkv = [on_gpu(1, 256, 3, 128, **how) if i == place else plain for i in range(3)]
        chosen = sparse_attention._choose(*qkv, block_q)
        assert isinstance(chosen, sparse_attention.HopperConfig) == (by_hand and not how)
        if capability < (9, 0):
            assert not chosen.descriptors


@pytest.mark.parametrize("gluon", [True, False])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("kind", ["row", "block"])
@pytest.mark.parametrize(
    ("k", "n", "dtype", "offset"),
    [
        (160, 136, torch.bfloat16, 0),
        (160, 136, torch.float16, 0),
        (160, 136, torch.float32, 0),  # the kernel writes two bytes a number
        (168, 136, torch.bfloat16, 0),  # rows of codes that are no multiple of 16 bytes
        (160, 132, torch.bfloat16, 0),  # rows of results
        (160, 136, torch.bfloat16, 8),
    ],
)
def test_where_int8_products_take_it(gluon, capability, kind, k, n, dtype, offset, monkeypatch):
    """On sm90 alone, for results of two bytes, and where the copy engine can read and write the rows."""
    monkeypatch.setattr(matmul_int8, "HAS_GLUON", gluon)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    codes, weight = on_gpu(300, k, dtype=torch.int8, offset=offset), on_gpu(n, k, dtype=torch.int8)
    chosen = matmul_int8._choose(kind, codes, weight, on_gpu(300, n, dtype=dtype))
    readable = (k, n, offset) == (160, 136, 0)
    by_hand = gluon and capability == (9, 0) and readable and dtype.itemsize == 2
    assert isinstance(chosen, matmul_int8.HopperConfig) == by_hand
    if not by_hand:
        assert chosen.descriptors == (capability == (9, 0))  # where not all can be described, pointers take over
