"""Selection: constraints, priorities, forcing; and two copies of the package in one process."""

import importlib.util
import sys
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import turbowan
from turbowan import ops
from turbowan.errors import MachineError
from turbowan.ops import OPERATIONS, Facts, registry
from turbowan.ops.registry import Constraints, Implementation

pytestmark = pytest.mark.usefixtures("fresh_seed")

CPU = Facts("cpu", torch.float32, 128)
H100 = Facts("cuda", torch.bfloat16, 128, (9, 0))


def doubled(x, weight, eps):
    """An implementation that can be told from the eager twin."""
    return 2 * OPERATIONS["rms_norm"].eager(x, weight, eps)


@pytest.fixture
def rms_norm(monkeypatch):
    """The operation with its eager twin alone; its list of implementations is put back afterwards."""
    operation = OPERATIONS["rms_norm"]
    monkeypatch.setattr(operation, "implementations", operation.implementations[:1])
    monkeypatch.setattr(operation, "_chosen", {})
    return operation


@pytest.fixture
def inputs():
    return torch.randn(3, 64), torch.rand(64) + 0.5


@pytest.mark.parametrize(
    ("constraints", "facts", "reason"),
    [
        (Constraints(), H100, None),
        (Constraints(devices=("cuda",)), CPU, "needs device cuda, got cpu"),
        (Constraints(devices=("cuda", "cpu")), CPU, None),
        (Constraints(dtypes=(torch.bfloat16,)), CPU, "needs dtype bfloat16, got torch.float32"),
        (Constraints(head_sizes=(64,)), CPU, "needs head size 64, got 128"),
        (Constraints(head_sizes=(64, 128)), CPU, None),
        (Constraints(min_capability=(9, 0)), H100, None),
        (Constraints(min_capability=(10, 0)), H100, "needs compute capability (10, 0), got (9, 0)"),
        (Constraints(min_capability=(8, 0)), CPU, "needs compute capability (8, 0), got None"),
        (Constraints(torch_from={(8, 0): "2.8"}), replace(H100, pytorch="2.8.0+cu128"), None),
        (
            Constraints(torch_from={(8, 0): "2.7", (9, 0): "2.10"}),
            replace(H100, pytorch="2.8.0"),
            "needs PyTorch 2.10 for compute capability (9, 0), got 2.8.0",
        ),
        (
            Constraints(torch_from={(8, 0): "2.7", (9, 0): None, (10, 0): "2.7"}),
            H100,
            "no PyTorch is known to have it for compute capability (9, 0)",
        ),
        (Constraints(torch_from={(8, 0): None}), CPU, None),
        (Constraints(packages=("numpy", "torch>=2.7")), CPU, None),
        (Constraints(packages=("numpy", "nump>=1")), CPU, "needs the package nump, which is not installed"),
        (
            Constraints(packages=("torch", "torch>=99.1")),
            CPU,
            f"needs torch 99.1 or later, got {metadata.version('torch')}",
        ),
        (
            Constraints(("cuda",)),
            replace(H100, rocm=True),
            "is for NVIDIA's GPUs, and this PyTorch is built for AMD's (ROCm)",
        ),
        (Constraints(), replace(H100, rocm=True), None),
        (Constraints(("cpu",)), replace(CPU, rocm=True), None),
    ],
)
def test_constraints_say_why(constraints, facts, reason):
    assert constraints.refusal(facts) == reason


@pytest.mark.parametrize(("version", "fits"), [("3.3.1", False), ("3.4.0", True), ("3.10.0+git", True), (None, True)])
def test_kernels_ask_for_a_triton_that_has_their_names(version, fits, monkeypatch):
    """PyTorch 2.7 brings 3.3, which nobody tried; a Triton that does not tell its version is taken."""
    monkeypatch.setattr(registry, "_installed", lambda _: True)
    monkeypatch.setattr(registry, "_version", lambda _: version)
    for name, choice in ops.explain(H100).items():
        kernels = {i.name for i in OPERATIONS[name].implementations} & {"triton", "cudnn"}
        assert not kernels or (choice.implementation.name == "triton") == fits, name
        for kernel in kernels if not fits else ():
            assert (kernel, "needs triton 3.4 or later, got 3.3.1") in choice.refused


def test_on_an_amd_gpu_plain_pytorch_runs(monkeypatch):
    monkeypatch.setattr(registry, "_installed", lambda _: True)
    chosen = {name: choice.implementation.name for name, choice in ops.explain(replace(H100, rocm=True)).items()}
    assert set(chosen.values()) == {"eager"}, chosen


def test_highest_priority_that_may_run_is_selected(rms_norm, inputs):
    eager = ops.rms_norm(*inputs)
    rms_norm.add(Implementation("gpu", doubled, Constraints(devices=("cuda",)), priority=9))
    assert torch.equal(ops.rms_norm(*inputs), eager)
    rms_norm.add(Implementation("doubled", doubled, priority=1))
    assert torch.equal(ops.rms_norm(*inputs), 2 * eager)
    choice = rms_norm.select(CPU)
    assert choice.implementation.name == "doubled"
    assert choice.refused == (("gpu", "needs device cuda, got cpu"),)
    assert rms_norm.select(Facts("cuda", torch.float32)).implementation.name == "gpu"


def test_a_forced_implementation_runs(rms_norm, inputs):
    eager = ops.rms_norm(*inputs)
    rms_norm.add(Implementation("doubled", doubled, priority=-1))
    assert torch.equal(ops.rms_norm(*inputs), eager)
    with ops.force(rms_norm="doubled"):
        assert torch.equal(ops.rms_norm(*inputs), 2 * eager)
        with ops.force(rms_norm="eager"):
            assert torch.equal(ops.rms_norm(*inputs), eager)
        assert torch.equal(ops.rms_norm(*inputs), 2 * eager)
    assert torch.equal(ops.rms_norm(*inputs), eager)


def test_a_forced_implementation_never_falls_back(rms_norm, inputs):
    rms_norm.add(Implementation("gpu", doubled, Constraints(devices=("cuda",))))
    with ops.force(rms_norm="gpu"), pytest.raises(MachineError, match=r"rms_norm cannot use 'gpu' here \(needs device"):
        ops.rms_norm(*inputs)
    with ops.force(rms_norm="fast"), pytest.raises(MachineError, match=r"'fast' here \(known: eager, gpu"):
        ops.rms_norm(*inputs)
    with ops.force(rms_norm="fast"), pytest.raises(MachineError):
        ops.explain(CPU)


def test_a_call_that_does_not_fit_goes_on_to_the_next_and_is_refused_by_force(rms_norm, inputs):
    """What depends on a call's arguments is asked at each call."""

    def short(x, weight, eps):
        return None if len(x) < 5 else f"is for 4 rows at most, got {len(x)}"

    x, weight = inputs
    eager, many = ops.rms_norm(x, weight), torch.randn(7, 64)
    rms_norm.add(Implementation("doubled", doubled, priority=1, fits=short, limits="up to 4 rows"))
    for _ in range(2):
        assert torch.equal(ops.rms_norm(x, weight), 2 * eager)
        assert torch.equal(ops.rms_norm(many, weight), rms_norm.eager(many, weight, 1e-6))
    with ops.force(rms_norm="doubled"):
        assert torch.equal(ops.rms_norm(x, weight), 2 * eager)
        with pytest.raises(MachineError, match=r"'doubled' for this call \(is for 4 rows at most, got 7\)"):
            ops.rms_norm(many, weight)
    rms_norm.add(Implementation("tripled", lambda *_: 3 * eager, priority=2, fits=lambda *_: "is never for you"))
    assert torch.equal(ops.rms_norm(x, weight), 2 * eager)
    assert rms_norm.select(CPU).others() == {
        "doubled": "could run, but tripled has priority 2 over 1",
        "eager": "could run, but tripled has priority 2 over 0",
    }


def test_who_takes_what_a_kernel_leaves_is_said(rms_norm):
    rms_norm.add(Implementation("doubled", doubled, priority=1, fits=lambda *_: None, limits="up to 4 rows"))
    assert rms_norm.select(CPU).others() == {"eager": "could run, but doubled has priority 1 over 0 for up to 4 rows"}


def test_a_forced_implementation_is_not_swapped_for_one_with_a_gradient(rms_norm, inputs):
    x, weight = inputs
    rms_norm.add(Implementation("doubled", doubled, priority=1))
    ops.rms_norm(x.requires_grad_(), weight).sum().backward()  # an automatic choice may
    assert x.grad is not None
    with ops.force(rms_norm="doubled"), pytest.raises(MachineError, match="only 'eager' has a gradient"):
        ops.rms_norm(x, weight)
    with ops.force(rms_norm="doubled"), torch.no_grad():
        ops.rms_norm(x, weight)


@pytest.mark.parametrize(("here", "entered"), [(0, [torch.device("cuda", 1)]), (1, [])])
def test_kernels_run_where_their_arguments_lie(rms_norm, monkeypatch, here, entered):
    """Triton launches on the current device, which need not be that of the tensors."""
    guards = []

    @contextmanager
    def guard(device):
        guards.append(device)
        yield
        guards.append("left")

    there = SimpleNamespace(
        is_cuda=True, device=torch.device("cuda", 1), dtype=torch.bfloat16, shape=(1, 64), get_device=lambda: 1
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: here)
    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    rms_norm.add(Implementation("gpu", lambda x: list(guards), Constraints(devices=("cuda",)), priority=1))
    assert rms_norm._run(there) == entered
    assert guards == [*entered, "left"][: 2 * len(entered)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_of_the_second_gpu():
    """Asked of the first one's thread: the right results, in the second one's stream."""
    heads = torch.randn(3, 1, 300, 2, 128, dtype=torch.bfloat16)
    weight, rest = torch.randn(128, 128) / 11, (torch.randn(128), 0.5)
    x, scale = torch.randn(2, 70, 256, dtype=torch.bfloat16), torch.randn(256)
    codes = ops.quantize_int8_rowwise(torch.randn(64, 256))
    calls = [
        lambda to: ops.rms_norm(to(x), to(scale)),
        lambda to: ops.residual_norm(to(x), to(x), format="int8_block")[1].float(),
        lambda to: ops.gelu_rows(to(x), "fp8_row")[0].float(),
        lambda to: ops.linear_int8_rowwise(to(x[0]), *map(to, codes)),
        lambda to: ops.attention(*map(to, heads)),
        lambda to: ops.sparse_linear_attention(*map(to, heads), to(weight), to(rest[0]), rest[1]),
        lambda to: ops.sparse_linear_attention(*map(to, heads), to(weight), to(rest[0]), rest[1], precision="int8"),
    ]
    with torch.cuda.device(0):
        for call in calls:
            first, second = (call(lambda given, i=i: given.to(f"cuda:{i}")) for i in (0, 1))
            assert second.device.index == 1
            assert torch.equal(second.cpu(), first.cpu())
            assert torch.cuda.current_device() == 0


def test_force_is_undone_after_an_error(rms_norm):
    with pytest.raises(ZeroDivisionError), ops.force(rms_norm="eager"):
        raise ZeroDivisionError
    assert rms_norm.forced is None


def test_explain_names_a_choice_for_every_operation():
    choices = ops.explain(CPU)
    assert list(choices) == sorted(OPERATIONS)
    for name, choice in choices.items():
        assert choice.implementation in OPERATIONS[name].implementations


def test_a_second_copy_of_the_package_keeps_its_own_choices(inputs):
    """Installed and cloned inside ComfyUI at once: one import must not break the other, nor answer for it."""
    folder = Path(turbowan.__file__).parent
    name = "another_turbowan"
    where = {"location": folder / "__init__.py", "submodule_search_locations": [str(folder)]}
    spec = importlib.util.spec_from_file_location(name, **where)
    try:
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        copy = importlib.import_module(f"{name}.ops")
        assert copy.OPERATIONS["rms_norm"] is not OPERATIONS["rms_norm"]
        expected = ops.rms_norm(*inputs)
        assert torch.equal(copy.rms_norm(*inputs), expected)
        copy.OPERATIONS["rms_norm"].add(Implementation("doubled", doubled, priority=1))
        assert torch.equal(copy.rms_norm(*inputs), 2 * expected)
        assert torch.equal(ops.rms_norm(*inputs), expected)
    finally:
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[module]
