"""What stays loaded, from sizes and what is free: on the host, on a GPU, under a budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from turbowan.errors import MachineError
from turbowan.memory.plan import HEADROOM, available_bytes, make_plan, weight_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GB = 10**9
SIZES = {"transformer": 10 * GB, "text_encoder": 6 * GB, "vae": 2 * GB}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A GPU's memory as PyTorch reports it, in bytes; change the values to change what it says."""
    memory = {"free": 40 * GB, "total": 80 * GB, "reserved": 0, "allocated": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (memory["free"], memory["total"]))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: memory["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: memory["allocated"])
    return memory


def test_weights_count_as_they_will_be_loaded() -> None:
    """Floats in the dtype of the run, whatever the file's; what is quantised as it is."""
    layer = nn.Linear(128, 256, device="meta", dtype=torch.float32)
    assert weight_bytes(layer, torch.float32) == 4 * (128 * 256 + 256)
    assert weight_bytes(layer, torch.bfloat16) == 2 * (128 * 256 + 256)
    layer.register_buffer("codes", torch.empty(1000, dtype=torch.int8, device="meta"))
    assert weight_bytes(layer, torch.bfloat16) == 2 * (128 * 256 + 256) + 1000


def test_the_host_has_some_memory_free() -> None:
    free = available_bytes(CPU)
    assert free > 2**28
    assert available_bytes(CPU, resident=7 * GB) == pytest.approx(free + 7 * GB, abs=2 * GB)


@pytest.mark.parametrize(
    ("mode", "free", "keep"),
    [("auto", 40, True), ("auto", 20, False), ("balanced", 40, True), ("balanced", 20, False),
     ("minimal", 80, False), ("speed", 80, True), ("speed", 19, True)],
)  # fmt: skip
def test_modes_on_a_gpu(gpu: dict[str, int], mode: str, free: int, keep: bool) -> None:
    gpu["free"] = free * GB
    plan = make_plan(mode, SIZES, GPU)
    assert plan.keep is keep
    assert plan.total == 18 * GB
    assert plan.available == free * GB
    for fact in (mode, "18.0 GB", f"{free}.0 GB", "over" if free < 18 / HEADROOM else "within"):
        assert fact in plan.reason


def test_what_fits_is_decided_at_the_headroom(gpu: dict[str, int]) -> None:
    gpu["free"] = int(18 * GB / HEADROOM) + 1
    assert make_plan("auto", SIZES, GPU).keep
    gpu["free"] -= 2
    assert not make_plan("auto", SIZES, GPU).keep


def test_a_plan_holds_for_the_next_request(gpu: dict[str, int]) -> None:
    """Once everything is loaded and PyTorch holds some memory back, less is free, but none of it is taken by others."""
    assert make_plan("auto", SIZES, GPU).keep
    gpu.update(free=12 * GB, reserved=28 * GB, allocated=18 * GB)
    assert available_bytes(GPU, resident=18 * GB) == 40 * GB
    assert make_plan("auto", SIZES, GPU, resident=18 * GB).keep
    assert not make_plan("auto", SIZES, GPU).keep  # the same seen as another process's


@pytest.mark.parametrize("budget", ["31GB", 31 * GB, "29GiB"])
def test_a_budget_limits_what_is_free(gpu: dict[str, int], budget: int | str) -> None:
    gpu["free"] = 80 * GB
    plan = make_plan("auto", SIZES, GPU, budget)
    assert plan.keep
    assert plan.available <= 31.2 * GB
    assert not make_plan("auto", SIZES, GPU, "29GB").keep
    gpu["free"] = 20 * GB
    assert make_plan("auto", SIZES, GPU, budget).available == 20 * GB  # a budget adds nothing


@pytest.mark.parametrize("mode", ["auto", "balanced", "minimal", "speed"])
def test_a_budget_below_the_largest_part_cannot_be_kept(mode: str) -> None:
    with pytest.raises(MachineError) as caught:
        make_plan(mode, {"vae": 10**6, "transformer": 9 * 10**6}, CPU, "8MB")
    assert str(caught.value) == (
        "transformer alone has 9.0 MB of weights, more than the 8.0 MB in the budget;"
        " take a quantised file or raise --gpu-budget"
    )


@pytest.mark.parametrize("mode", ["auto", "minimal", "speed"])
def test_a_gpu_smaller_than_the_largest_part(gpu: dict[str, int], mode: str) -> None:
    gpu["free"] = 8 * GB
    with pytest.raises(MachineError) as caught:
        make_plan(mode, SIZES, GPU)
    assert str(caught.value) == (
        "transformer alone has 10.0 GB of weights, more than the 8.0 GB free on cuda; take a quantised file"
    )


def test_speed_needs_room_for_everything(gpu: dict[str, int]) -> None:
    gpu["free"] = 17 * GB
    with pytest.raises(MachineError) as caught:
        make_plan("speed", SIZES, GPU)
    assert str(caught.value) == (
        "memory 'speed' keeps all 18.0 GB of weights, more than the 17.0 GB free on cuda; take 'auto' or 'minimal'"
    )
    assert not make_plan("auto", SIZES, GPU).keep


def test_a_host_without_a_budget_may_swap() -> None:
    huge = {"transformer": 10**15, "vae": 1}
    assert not make_plan("auto", huge, CPU).keep
    assert make_plan("speed", huge, CPU).keep
