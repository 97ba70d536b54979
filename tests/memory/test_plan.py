"""Plans from numbers alone: cards of every size, models of true sizes; and how near formulas are to measurements."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from turbowan.errors import MachineError
from turbowan.memory.activations import (
    Work,
    decode_bytes,
    decode_fixed,
    decode_grid,
    decode_grids,
    denoise_bytes,
    piece_bytes,
    token_bytes,
)
from turbowan.memory.catalog import COMMON, common_model
from turbowan.memory.plan import Model, Place, Plan, make_plan
from turbowan.memory.room import CONTEXT, Room
from turbowan.memory.sizes import PartSize
from turbowan.models.transformer import TransformerConfig
from turbowan.models.vae_tiles import Grid

GB = 10**9
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h200"
BEFORE_BLOCKS_FREED = ("3c252b4", "e01bdbc")  # commits at which a block held what was dead to its end
SIZES = {"480p": (832, 480), "720p": (1280, 720)}
CONFIG = TransformerConfig(dim=128, ffn_dim=512, num_layers=4, text_dim=128)
PARTS = {"transformer": PartSize(10, (20,) * 4), "text_encoder": PartSize(50), "vae": PartSize(5)}
SMALL = Model("small", PARTS, CONFIG, 64, 8)
TINY_WORK = Work(32, 32, 1)


def card(gb: float, host: int = 128) -> Room:
    return Room(int(gb * GB), host * GB)


def plan(name: str, resolution: str, gb: float, mode: str = "auto", host: int = 128) -> Plan:
    model, work = common_model(name)
    width, height = SIZES[resolution]
    return make_plan(model, replace(work, width=width, height=height), card(gb, host), mode)


def records(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / file).read_text().splitlines()]


@pytest.mark.parametrize("record", records("transformer.jsonl"), ids=lambda record: record["case"])
def test_a_step_takes_what_was_measured(record: dict[str, Any]) -> None:
    """At most an eighth more, and less only by what `spread` covers. The 256 MiB that the benchmark empties the cache
    with go off. In older records blocks held the old stream and its change to their end, and what both attentions gave,
    and q, k and v while the result was projected; the embedded tokens were held all the time."""
    if "size" not in record:
        pytest.skip("of a time when records did not tell the model")
    config = common_model(record["size"])[0].config
    width, height = SIZES["720p" if "1280x720" in record["case"] else "480p"]
    work = Work(width, height, record["shape"]["num_frames"], noises=0, eight_bit=record["precision"] == "int8")
    planned, least = denoise_bytes(config, work), 0.97
    if record["commit"] in BEFORE_BLOCKS_FREED:
        now, stream = token_bytes(config, work), 2 * config.dim  # bytes a token
        then = max(now["feed_forward"] + 4 * stream, now["projection"] + 7 * stream)
        planned, least = planned + work.tokens * (stream + then - max(now.values())), 1.01
    measured = record["peak_gib"] - record["weights_gib"] - 0.25
    assert least <= planned / 2**30 / measured < 1.13


@pytest.mark.parametrize("record", [r for r in records("memory.jsonl") if r.get("gpu_budget")], ids=lambda r: r["case"])
def test_a_request_within_a_budget_takes_what_was_measured(record: dict[str, Any]) -> None:
    """What lived at once was in steps, where of all parts only the expert in use is on the GPU; and PyTorch kept to its
    share of the budget, CUDA to the rest."""
    shape, plan, peak = record["shape"], record["plan"], record["peak_gib"]
    name = "1.3B" if record["case"].startswith("1.3B") else "A14B-I2V int8"
    model, work = common_model(name, shape["width"], shape["height"])
    size, resident = model.parts[model.nets[0]], plan["places"][model.nets[0]]["resident"]
    streamed = resident < len(size.blocks)
    weights = size.rest + (resident + 2) * size.largest_block if streamed else size.total
    lived, planned = peak["gpu_by_pytorch"] * 2**30 - weights, denoise_bytes(model.config, work, told=False)
    assert 0.95 * lived <= planned
    assert lived + weights <= max(plan["peaks"].values())
    assert peak["gpu_reserved"] * 2**30 <= plan["cap"]
    assert peak["gpu"] * 2**30 <= plan["cap"] + CONTEXT


def test_a_whole_pipeline_takes_what_was_measured() -> None:
    """1.3B in bfloat16 at 832x480 with a text encoder of two layers and the plain VAE, whose decoding was the peak."""
    record = records("pipeline-plain-vae.jsonl")[0]
    model, work = common_model("1.3B")
    text = model.parts["text_encoder"]
    weights = model.parts["transformer"].total + model.coder.weights + 2 * text.largest_block + 2 * 512 * 4096
    decode = decode_bytes(model.coder, replace(work, kernels=False), Grid(1, 1, 1))
    assert (weights + decode) / 2**30 == pytest.approx(record["peak_gib"]["gpu"], rel=0.1)


@pytest.mark.parametrize("mode", ["auto", "balanced", "minimal", "speed"])
@pytest.mark.parametrize("resolution", SIZES)
@pytest.mark.parametrize("name", COMMON)
def test_every_plan_fits_and_a_larger_card_never_does_worse(name: str, resolution: str, mode: str) -> None:
    stays, fitted = 0, False
    for gb in (6, 8, 12, 16, 24, 48, 80, 141):
        try:
            found = plan(name, resolution, gb, mode)
        except MachineError:
            assert not fitted
            continue
        fitted = True
        assert 0 < found.peak <= found.usable < gb * GB
        assert found.resident <= found.peak
        on_device = found.resident + sum(place.resident for place in found.places.values() if place.home != "gpu")
        assert on_device >= stays
        stays = on_device if mode != "auto" else 0
    assert fitted


@pytest.mark.parametrize(
    ("name", "resolution", "gb", "summary"),
    [
        ("1.3B", "480p", 6, "parts take turns"),
        ("1.3B", "480p", 12, "all but text encoder stays on the device"),
        ("1.3B", "720p", 24, "everything stays on the device"),
        ("14B int8", "480p", 24, "all but text encoder stays on the device"),
        ("14B int8", "720p", 80, "everything stays on the device"),
        ("A14B-I2V int8", "480p", 24, "experts take turns"),
        ("A14B-I2V int8", "720p", 24, "experts take turns"),
        ("A14B-I2V int8", "720p", 20, "3. of 40 blocks stay while in use, the others stream"),
        ("A14B-I2V int8", "720p", 16, "2. of 40 blocks stay while in use, the others stream"),
        ("A14B-I2V int8", "480p", 12, "2. of 40 blocks stay while in use, the others stream"),
        ("A14B-I2V int8", "720p", 141, "everything stays on the device"),
    ],
)  # fmt: skip
def test_what_cards_get(name: str, resolution: str, gb: float, summary: str) -> None:
    assert re.fullmatch(summary, plan(name, resolution, gb).summary)


def test_a14b_fits_a_budget_of_12_gb() -> None:
    """The bar of small cards: 480p and 720p, context within the budget."""
    model, work = common_model("A14B-I2V int8")
    for resolution in SIZES:
        width, height = SIZES[resolution]
        found = make_plan(model, replace(work, width=width, height=height), Room(140 * GB, 128 * GB, budget=12 * GB))
        assert found.cap == 12 * GB - CONTEXT
        assert found.peak < found.cap
        assert all(place.home == "host" and place.pinned for place in found.places.values())


def test_homes_follow_the_hosts_room() -> None:
    """Pinned, then only the transformers, then nothing: read anew for each request."""
    def homes(host: int) -> dict[str, tuple[str, bool]]:
        return {role: (p.home, p.pinned) for role, p in plan("A14B-I2V int8", "480p", 16, host=host).places.items()}

    assert set(homes(128).values()) == {("host", True)}
    some = homes(40)
    assert some["high_noise"] == some["vae"] == ("host", True)
    assert some["low_noise"][0] == "host"
    assert some["text_encoder"] == ("disk", False)
    none = homes(4)
    assert none.pop("vae") == ("host", True)
    assert set(none.values()) == {("disk", False)}


def test_the_hosts_room_is_kept_for_what_is_read_there_in_another_form() -> None:
    """Each part is read alone; what its file holds as it is used takes nothing."""
    experts = {role: PartSize(10, (GB,) * 10, converted=10 * GB) for role in ("high_noise", "low_noise")}
    model = Model("two", {**experts, "text_encoder": PartSize(10, (GB,) * 5), "vae": PartSize(GB // 10)}, CONFIG, 64, 8)

    def made(host: float, mode: str = "auto", gpu: int = 8, model: Model = model) -> Plan:
        return make_plan(model, TINY_WORK, Room(gpu * GB, int(host * GB)), mode)

    def hosted(found: Plan) -> set[str]:
        return {role for role, place in found.places.items() if place.home == "host"}

    assert hosted(made(40)) == set(model.parts)
    assert made(40).host == pytest.approx(25.1 * GB, rel=1e-3)
    assert hosted(made(20)) == {"vae", "text_encoder"}  # an expert beside the other one's ten would be too much
    assert made(20).host == pytest.approx(15.1 * GB, rel=1e-3)
    assert hosted(made(20, gpu=16)) == {"high_noise", "vae", "text_encoder"}  # the other one goes straight to the GPU
    assert made(11, "minimal").host == 10 * GB
    assert made(9.5, "minimal").host == 10 * GB  # the host may swap

    wider = {role: replace(size, converted=18 * GB) for role, size in experts.items()}  # before it is rounded
    assert made(60, model=replace(model, parts={**model.parts, **wider})).host == pytest.approx(33.1 * GB, rel=1e-3)
    own = {role: replace(size, converted=0) for role, size in experts.items()}
    assert made(1, "minimal", model=replace(model, parts={**model.parts, **own})).host == 0


@pytest.mark.parametrize("size", [(832, 480), (480, 832), (1280, 720), (624, 624), (256, 160)])
def test_the_bytes_that_a_grid_takes_are_enough_for_it(size: tuple[int, int]) -> None:
    """To the byte, or frames would be cut for nothing; so the least memory, too, keeps frames whole where they fit."""
    model, work = common_model("1.3B", *size)
    fastest = decode_grids(model.coder, work)[0]
    for latents in range(1, fastest.latents + 1):
        grid = Grid(1, 1, latents)
        rising = decode_bytes(model.coder, work, grid) - decode_fixed(model.coder, work) - piece_bytes(work, grid)
        found = decode_grid(model.coder, work, rising)
        assert found.whole
        assert found.latents >= latents
    assert make_plan(model, work, card(141), "minimal").grid == Grid(1, 1, 1)


def test_longer_loading_needs_room_beside_the_stages() -> None:
    assert plan("A14B-I2V int8", "720p", 141, "balanced").longer
    assert not plan("A14B-I2V int8", "720p", 12).longer


def test_modes_on_a_gpu() -> None:
    assert plan("1.3B", "480p", 80).keep
    assert plan("1.3B", "480p", 80, "speed").keep
    balanced = plan("1.3B", "480p", 80, "balanced")
    assert balanced.resident == 0
    assert all(place.home == "host" for place in balanced.places.values())
    assert balanced.places["transformer"].resident == 30
    minimal = plan("1.3B", "480p", 80, "minimal")
    assert all(place.home == "disk" for place in minimal.places.values())
    assert minimal.places["transformer"].streamed
    assert minimal.peak < balanced.peak


def test_speed_is_refused_where_not_everything_fits() -> None:
    with pytest.raises(MachineError, match=r"14B int8 at 1280x720, 81 frames: [a-z]+ takes .* with memory 'speed'"):
        plan("14B int8", "720p", 24, "speed")


def test_what_cannot_fit_is_refused_with_numbers() -> None:
    with pytest.raises(MachineError) as caught:
        plan("A14B-I2V int8", "720p", 8)
    assert "A14B-I2V int8 at 1280x720, 81 frames: " in str(caught.value)
    assert "at the least, more than the 7.4 GB to be had (8.0 GB free on cuda, less a margin)" in str(caught.value)


def test_a_budget_adds_nothing_and_leaves_the_context_out() -> None:
    assert Room(20 * GB, GB, budget=24 * GB).usable == Room(20 * GB, GB).usable
    assert Room(80 * GB, GB, budget=24 * GB).cap == 24 * GB - CONTEXT
    assert Room(80 * GB, GB, budget=24 * GB).limited
    assert Room(80 * GB, GB, "cpu", budget=24 * GB).cap == 24 * GB


def test_a_cpu_keeps_parts_or_frees_them_and_may_swap() -> None:
    room = Room(10 * GB, 10 * GB, "cpu")
    kept = make_plan(SMALL, replace(TINY_WORK, kernels=False), room)
    assert kept.keep
    assert kept.decode_budget is None
    freed = make_plan(SMALL, replace(TINY_WORK, kernels=False), room, "minimal")
    assert {place.home for place in freed.places.values()} == {"disk"}
    assert not any(place.streamed for place in freed.places.values())
    none = make_plan(SMALL, replace(TINY_WORK, kernels=False), Room(100, 100, "cpu"))  # it may swap
    assert {place.home for place in none.places.values()} == {"disk"}
    with pytest.raises(MachineError, match="in the budget"):
        make_plan(SMALL, replace(TINY_WORK, kernels=False), replace(room, budget=100))


def test_tiles_only_where_whole_frames_do_not_fit() -> None:
    model, work = common_model("1.3B")
    work = replace(work, width=1280, height=720)
    assert decode_grid(model.coder, work, 100 * GB).whole
    small = decode_grid(model.coder, work, 4 * GB)
    assert not small.whole
    assert decode_bytes(model.coder, work, small) < decode_bytes(model.coder, work, Grid(1, 1, 1))


def test_the_vae_chooses_the_tiles_that_the_plan_says() -> None:
    """`vae_fused.decoder_grid` on the same numbers."""
    from turbowan.models.vae import WanVAE
    from turbowan.models.vae_fused import decoder_grid

    with torch.device("meta"):
        decoder = WanVAE(96).bfloat16().decoder
    model, work = common_model("1.3B")
    for width, height in SIZES.values():
        work = replace(work, width=width, height=height)
        x = torch.empty(1, 21, height // 8, width // 8, 384, dtype=torch.bfloat16, device="meta")
        for budget in (GB, 3 * GB, 5 * GB, 8 * GB, 20 * GB):
            assert decode_grid(model.coder, work, budget) == decoder_grid(decoder, x, budget)


def test_blocks_that_stay_are_what_there_is_room_for() -> None:
    found = plan("14B int8", "720p", 16)
    place = found.places["transformer"]
    block = place.nbytes / 41
    assert found.usable - block < found.peaks["denoise"] <= found.usable
    assert 0 < place.resident < place.blocks == 40


def test_rows_tell_every_part_and_stage() -> None:
    rows = list(plan("A14B-I2V int8", "720p", 16).rows())
    names = [row[0] for row in rows]
    assert names == [
        "high noise", "low noise", "text encoder", "vae", "text", "condition", "denoise", "switch", "decode",
        "host memory", "usable",
    ]
    assert "pinned" in rows[0][2]


def test_places_in_words() -> None:
    assert Place("gpu", GB).text == "on the device"
    assert Place("disk", GB, 4).text == "read anew for each request; its 4 blocks stream through"
    assert "3 of 4 blocks stay" in Place("host", GB, 4, 3, True).text
    assert not Place("host", GB, 4, 4).streamed
