"""Whatever the plan, the frames are the same: parts that stay, take turns, or stream block by block, on the CPU too."""

from __future__ import annotations

import gc
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import turbowan
from turbowan import Engine, GenerateRequest
from turbowan.bench.memory_watch import host_memory
from turbowan.checkpoints.mapped import FileMaps
from turbowan.errors import MachineError, Note
from turbowan.machine import trim_heap
from turbowan.memory.hosted import Hosted
from turbowan.memory.plan import Place, Plan, make_plan
from turbowan.memory.room import CONTEXT
from turbowan.memory.sizes import part_size
from turbowan.models.pack import prepare_block
from turbowan.stages import LOADERS

SMALL = {"width": 64, "height": 48, "num_frames": 5, "num_steps": 2, "boundary": 0.95}
PICTURE = np.random.default_rng(3).integers(0, 256, (48, 64, 3), dtype=np.uint8)
WAYS: dict[str, Callable[[str, Place], Place]] = {
    "resident": lambda role, place: replace(place, home="gpu"),
    "switched": lambda role, place: replace(place, home="host", resident=place.blocks),
    "half streamed": lambda role, place: replace(place, home="host", resident=place.blocks // 2),
    "streamed": lambda role, place: replace(place, home="host", resident=0),
    "from disk": lambda role, place: replace(place, home="disk", resident=0),
    "released": lambda role, place: replace(place, home="disk", resident=place.blocks),
}


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have every plan put the parts in one of WAYS, whatever fits."""

    def force(way: str) -> None:
        def plan(*args: object) -> Plan:
            made = make_plan(*args)  # type: ignore[arg-type]
            places = {role: WAYS[way](role, place) for role, place in made.places.items()}
            return replace(made, places=places, early=way != "from disk")

        monkeypatch.setattr("turbowan.engine.make_plan", plan)

    return force


def frames(engine: Engine, precision: str, seed: int = 1, **more: object) -> np.ndarray:
    image = PICTURE if engine.needs_image else None
    small = {name: value for name, value in SMALL.items() if engine.needs_image or name != "boundary"}
    if precision == "bf16" and engine.device.type == "cpu":  # slow there
        small |= {"width": 16, "height": 16, "num_frames": 1}
    request = GenerateRequest(prompt="a red ring", image=image, precision=precision, seed=seed, **small, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return engine.generate(request).frames


@pytest.mark.parametrize("model", ["tiny", "tiny-i2v"])
@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_the_same_frames_bit_by_bit(model: str, precision: str, forced: Callable[[str], None]) -> None:
    engine = Engine.load(model, device="cpu")
    forced("resident")
    wanted = frames(engine, precision)
    for way in WAYS:
        forced(way)
        assert np.array_equal(frames(engine, precision), wanted), way
        if way == "half streamed":  # another request finds what the first one left
            assert np.array_equal(frames(engine, precision), wanted)
        hosted = {role for role in engine.manifest.files if engine.parts.is_hosted(role)}
        assert bool(hosted) == (way in ("switched", "half streamed", "streamed", "from disk"))
        if way in ("from disk", "released"):
            assert engine.parts.nbytes == 0
        if way in ("switched", "half streamed", "streamed"):
            assert engine.parts.nbytes == 0  # all of it went back to the host
            assert engine.parts.host_bytes > 10**7


def test_streamed_blocks_take_the_memory_of_two(forced: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """While steps run: what is in no block and two blocks, not all."""
    engine = Engine.load("tiny", device="cpu")
    taken = []
    run = turbowan.stages.Run
    told = run._tell

    def tell(self: turbowan.stages.Run, net: nn.Module, condition: object) -> object:
        taken.append(engine.parts.nbytes)
        return told(self, net, condition)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "_tell", tell)
    size = engine.part_sizes(torch.float32)["transformer"]
    for way, blocks in (("streamed", 2), ("switched", len(size.blocks))):
        taken.clear()
        forced(way)
        frames(engine, "float32")
        assert max(taken) == pytest.approx(size.rest + blocks * size.largest_block, rel=0.02)


def test_another_size_another_plan(forced: Callable[[str], None]) -> None:
    """Plans may change from request to request."""
    engine = Engine.load("tiny-i2v", device="cpu")
    forced("resident")
    wanted = frames(engine, "int8_block")
    for way in ("streamed", "resident", "from disk", "half streamed", "switched", "released", "streamed"):
        forced(way)
        assert np.array_equal(frames(engine, "int8_block"), wanted)


def test_a_host_that_would_swap_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load("tiny", device="cpu")
    monkeypatch.setattr("turbowan.engine.make_plan", lambda *args: replace(make_plan(*args), host=10**15))
    with pytest.warns(Note, match=r"weights take 1000000\.0 GB of the host's memory, which has .* it may swap"):
        engine.generate(GenerateRequest(prompt="a ring", **{**SMALL, "boundary": None}))


@pytest.mark.parametrize("longer", [True, False])
def test_loading_in_the_background_ends_where_there_is_no_room_for_it(
    longer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the picture is read; else it goes on."""
    engine, loaded, seen = Engine.load("tiny-i2v", device="cpu"), list[str](), dict[str, bool]()
    load = turbowan.stages.LOADERS["high_noise"]

    def slowly(*args: object, **kwargs: object) -> nn.Module:
        time.sleep(0.5)
        part = load(*args, **kwargs)
        loaded.append("high noise")
        return part

    monkeypatch.setitem(turbowan.stages.LOADERS, "high_noise", slowly)
    monkeypatch.setattr("turbowan.engine.make_plan", lambda *args: replace(make_plan(*args), longer=longer))
    request = GenerateRequest(prompt="a red ring", image=PICTURE, seed=1, **SMALL)
    engine.generate(request, lambda at: seen.setdefault(at.stage, bool(loaded)))
    assert seen["condition"] is not longer


def test_an_end_in_the_middle_leaves_nothing_behind(forced: Callable[[str], None]) -> None:
    engine = Engine.load("tiny-i2v", device="cpu")
    forced("half streamed")
    wanted = frames(engine, "int8")
    assert engine.parts.nbytes == 0
    for stage in ("text", "condition", "denoise", "decode"):

        def stop(at: turbowan.Progress, stage: str = stage) -> None:
            if at.stage == stage and at.done == at.total - (stage == "denoise"):
                raise KeyboardInterrupt

        request = GenerateRequest(prompt="a red ring", image=PICTURE, precision="int8", seed=1, **SMALL)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(request, stop)
        assert engine.parts.nbytes == 0
    assert np.array_equal(frames(engine, "int8"), wanted)


def test_what_fails_in_the_background_is_raised_where_it_is_wanted(
    forced: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load("tiny-i2v", device="cpu")
    seen: list[str] = []
    load = turbowan.stages.LOADERS["high_noise"]

    def fail(*_: object, **__: object) -> nn.Module:
        raise MachineError("the disk is gone")

    for way in ("resident", "streamed"):
        forced(way)
        monkeypatch.setitem(turbowan.stages.LOADERS, "high_noise", fail)
        request = GenerateRequest(prompt="a red ring", image=PICTURE, seed=1, **SMALL)
        with pytest.raises(MachineError, match="the disk is gone"):
            engine.generate(request, lambda at: seen.append(at.stage))
        assert seen[-1] == "denoise"
        monkeypatch.setitem(turbowan.stages.LOADERS, "high_noise", load)
        assert engine.generate(request).frames.shape == (5, 48, 64, 3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_memory_stays_flat_over_many_requests(forced: Callable[[str], None]) -> None:
    """Of this process, without pages of files and what its allocator keeps, over 20 requests in each way."""

    def held() -> int:
        gc.collect()
        trim_heap()
        return host_memory()["own"]

    engine = Engine.load("tiny-i2v", device="cpu")
    for way in WAYS:
        forced(way)
        for _ in range(4):
            frames(engine, "int8_block")
        before = held()
        for seed in range(20):
            frames(engine, "int8_block", seed)
        assert held() <= before * 1.02, way


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model", ["tiny", "tiny-i2v"])
@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_the_same_frames_on_a_gpu(model: str, precision: str, forced: Callable[[str], None]) -> None:
    engine = Engine.load(model, device="cuda")
    forced("resident")
    wanted = frames(engine, precision)
    for way in WAYS:
        forced(way)
        for _ in range(2):
            found = frames(engine, precision)
            if way != "from disk":  # q, k and v are three products there
                assert np.array_equal(found, wanted), way
            assert np.abs(found.astype(int) - wanted).mean() < 1
        torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_budget_caps_what_is_taken_on_a_gpu() -> None:
    """PyTorch may not take more while it runs, and may again afterwards."""
    engine = Engine.load("tiny-i2v", device="cuda")
    wanted = frames(engine, "int8")
    engine.parts.clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    capped = frames(engine, "int8", gpu_budget="2GB")
    assert torch.cuda.max_memory_reserved() <= 2e9 - CONTEXT
    assert np.array_equal(capped, wanted)
    assert torch.cuda.memory_stats()["num_alloc_retries"] == 0
    del engine
    with pytest.raises(MachineError, match=r"fits|nothing smaller"):
        frames(Engine.load("tiny-i2v", device="cuda"), "int8", gpu_budget="1GB")
    free = torch.cuda.mem_get_info()[0]
    if free > 4 * 10**9:
        assert torch.empty(3 * 10**9, dtype=torch.uint8, device="cuda").numel()


def test_a_refusal_names_what_fits() -> None:
    """Found by planning smaller requests; asked for, it is not refused."""
    engine = Engine.load("tiny", device="cpu")
    big = GenerateRequest(prompt="a ring", width=832, height=480, num_frames=81, gpu_budget="1.7GB")
    with pytest.raises(MachineError) as caught:
        engine.plan(big)
    pattern = r".* 832x480, 81 frames: \w+ takes .* to be had .* in the budget, .*; (.*)x(.*), (.*) frames? fits"
    found = re.match(pattern, str(caught.value))
    assert found, str(caught.value)
    width, height, count = map(int, found.groups())
    assert engine.plan(replace(big, width=width, height=height, num_frames=count)).peak < 1.7e9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        with pytest.raises(MachineError, match="nothing smaller fits either"):
            engine.plan(replace(big, gpu_budget="1MB"))
    assert engine.parts.nbytes == 0


@pytest.mark.parametrize(
    ("role", "dtype", "format"),
    [
        ("transformer", torch.bfloat16, None),
        ("transformer", torch.float32, None),
        ("transformer", torch.bfloat16, "int8_row"),
        ("text_encoder", torch.bfloat16, None),
        ("text_encoder", torch.float32, None),
    ],
)
def test_what_a_part_takes_of_the_host_while_it_streams_from_its_file(
    role: str, dtype: torch.dtype, format: str | None
) -> None:
    """What is in the file as it is used stays there."""
    engine = Engine.load("tiny", device="cpu")
    size, path = part_size(engine.outlines[role], dtype, format), engine.manifest.files[role]
    change = None if format is None else partial(prepare_block, linears=format, dtype=dtype)
    part = LOADERS[role](path, "cpu", dtype)
    place = Place("disk", size.total, len(size.blocks))
    Hosted(part, place, torch.device("cpu"), change)
    maps = FileMaps()
    weights = {id(weight): weight for weight in (*part.parameters(), *part.buffers())}.values()
    taken = sum(weight.nbytes for weight in weights if maps.locate(weight.detach()) is None)
    assert taken <= size.converted <= taken + size.rest
