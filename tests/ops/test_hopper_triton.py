"""Whether the kernels that are placed by hand can be built with this Triton."""

import importlib.util
import sys

import pytest

pytest.importorskip("triton")
import triton

from turbowan.ops import triton as kernels
from turbowan.ops.triton import hopper


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
