"""Before anything is loaded: where each part lives, how it is used, and what every stage takes. No part is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..errors import MachineError
from ..machine import size_text
from ..models.transformer import TransformerConfig
from ..models.vae_tiles import Grid
from .activations import (
    Coder,
    Work,
    decode_bytes,
    decode_fixed,
    decode_grid,
    decode_grids,
    denoise_bytes,
    encode_bytes,
    encode_fixed,
    piece_bytes,
    text_bytes,
)
from .room import PINNED_SHARE, Room
from .sizes import PartSize

STAGES = ("text", "condition", "denoise", "switch", "decode")
TRANSFORMERS = ("transformer", "high_noise", "low_noise")
HOMES = {"gpu": "on the device", "host": "in host memory", "disk": "read anew for each request"}
IMAGE_ENCODER_WORK = 3 * 10**8  # bytes that CLIP's tower takes on one picture


@dataclass(frozen=True)
class Place:
    """Where a part's weights are between requests, and how they get to the device.

    home: "gpu" (they stay on the device), "host" or "disk". pinned: locked, so that a GPU copies while it computes.
    blocks: how many there are. resident: of these, how many are on the device together while the part is in use; the
    others come one ahead and go again. nbytes: of all weights.
    """

    home: str
    nbytes: int
    blocks: int = 0
    resident: int = 0
    pinned: bool = False

    @property
    def streamed(self) -> bool:
        return self.home != "gpu" and self.resident < self.blocks

    @property
    def hosted(self) -> bool:
        """Whether it is lent to the device from the host."""
        return self.home == "host" or self.streamed

    @property
    def text(self) -> str:
        if self.home == "gpu":
            return HOMES["gpu"]
        where = HOMES[self.home] + (", pinned" if self.pinned else "")
        if not self.streamed:
            return f"{where}; whole on the device while in use"
        if not self.resident:
            return f"{where}; its {self.blocks} blocks stream through"
        return f"{where}; {self.resident} of {self.blocks} blocks stay while in use, the others stream"


@dataclass(frozen=True)
class Plan:
    """What `make_plan` decided.

    places: by role. peaks: bytes on the device at most, by stage, 0 where a stage has nothing to do. usable: bytes they
    had to fit in. cap: bytes PyTorch is held to, with a budget. decode_budget, encode_budget: bytes for the VAE's
    layers (None: it may choose). grid: what decoding will make of it. early: the transformers load while the text is
    encoded. longer: and while the picture is, and the first of two denoises. host: bytes of weights at most in the
    host's memory, of an engine on a GPU.
    """

    mode: str
    room: Room
    places: Mapping[str, Place]
    peaks: Mapping[str, int]
    decode_budget: int | None
    encode_budget: int | None
    grid: Grid
    early: bool
    longer: bool
    host: int

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def usable(self) -> int:
        return self.room.usable

    @property
    def cap(self) -> int | None:
        return self.room.cap

    @property
    def resident(self) -> int:
        """Bytes of weights that stay on the device between stages and requests."""
        return sum(place.nbytes for place in self.places.values() if place.home == "gpu")

    @property
    def keep(self) -> bool:
        """Whether every part stays on the device."""
        return all(place.home == "gpu" for place in self.places.values())

    @property
    def tight(self) -> bool:
        """Whether the device's allocator must waste nothing: parts come and go, or half of the memory is not enough."""
        return not self.keep or 2 * self.peak > self.usable

    @property
    def reason(self) -> str:
        """One line."""
        return f"memory {self.mode}: {self.summary}; peak {size_text(self.peak)} of {size_text(self.usable)}"

    @property
    def summary(self) -> str:
        """In a few words."""
        nets = [place for role, place in self.places.items() if role in TRANSFORMERS]
        net = nets[0]
        if self.keep:
            return "everything stays on the device"
        if net.home == "gpu":
            others = [role.replace("_", " ") for role, place in self.places.items() if place.home != "gpu"]
            return f"all but {', '.join(others)} stays on the device"
        if not net.streamed:
            return "experts take turns" if len(nets) > 1 else "parts take turns"
        if net.resident:
            return f"{net.resident} of {net.blocks} blocks stay while in use, the others stream"
        return f"all {net.blocks} blocks stream"

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """For a table: parts with their weights and places, then stages with their peaks."""
        for role, place in self.places.items():
            yield role.replace("_", " "), size_text(place.nbytes), place.text
        for stage, peak in self.peaks.items():
            if peak:
                yield stage, size_text(peak), "tiles: " + _grid_text(self.grid) if stage == "decode" else ""
        if self.host:
            yield "host memory", size_text(self.host), f"weights; {size_text(self.room.host)} to be had"
        budget = "" if self.room.budget is None else f", budget {size_text(self.room.budget)}"
        yield "usable", size_text(self.usable), f"{size_text(self.room.limit)} {self.room.place}{budget}, less a margin"

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        places = {
            role: {"home": p.home, "bytes": p.nbytes, "blocks": p.blocks, "resident": p.resident, "pinned": p.pinned}
            for role, p in self.places.items()
        }
        return {
            "mode": self.mode, "summary": self.summary, "usable": self.usable, "cap": self.cap, "places": places,
            "peaks": dict(self.peaks), "early": self.early, "tiles": [self.grid.rows, self.grid.columns],
            "host": self.host,
        }  # fmt: skip


def _grid_text(grid: Grid) -> str:
    if not grid.whole:
        return f"{grid.rows} x {grid.columns}, the whole clip each"
    return f"none, {grid.latents} latent frame{'s' if grid.latents > 1 else ''} at a time"


@dataclass(frozen=True)
class Model:
    """A model in numbers.

    name: for messages. parts: by role. config: the transformers'. text_width: the text encoder's. vae_base: its width.
    """

    name: str
    parts: Mapping[str, PartSize]
    config: TransformerConfig
    text_width: int
    vae_base: int = 96

    @property
    def nets(self) -> list[str]:
        return [role for role in TRANSFORMERS if role in self.parts]

    @property
    def coder(self) -> Coder:
        return Coder(self.vae_base, self.parts["vae"].total)


def make_plan(model: Model, work: Work, room: Room, mode: str = "auto") -> Plan:
    """The first that fits of what the mode allows, from the fastest on.

    "speed": everything stays on the device. "auto": that, or all but the encoders, or parts on the host that come to
    the device for their stage, with as many of the transformer's blocks as there is room for and the others streamed.
    "balanced": the last of these at once, so that little is taken between requests. "minimal": nothing stays anywhere,
    all blocks stream. On a CPU, parts stay or are freed after their stage.

    Raises:
        MachineError: not even the one that takes the least fits; where nothing is limited by anything but the host's
            own memory, which may swap, there is always a plan.
    """
    last: Plan | None = None
    fits: Plan | None = None
    for last in _candidates(model, work, room, mode):
        if last.peak <= room.usable:
            fits = last
            if last.host <= room.host:  # else the host would swap, if no other fits better
                break
    if fits is not None:
        return fits
    assert last is not None
    if not room.on_gpu and room.budget is None:
        return last
    stage, peak = max(last.peaks.items(), key=lambda item: item[1])
    what = f"{model.name} at {work.width}x{work.height}, {work.frames} frames"
    if work.samples > 1:
        what += f", {work.samples} samples"
    asks = f"with memory '{mode}'" if mode == "speed" else "at the least"
    raise MachineError(
        f"{what}: {stage} takes {size_text(peak)} {asks}, more than the {size_text(room.usable)} to be had"
        f" ({size_text(room.limit)} {room.place}, less a margin)"
    )


def _candidates(model: Model, work: Work, room: Room, mode: str) -> Iterator[Plan]:
    everything = dict.fromkeys(model.parts, "gpu")
    nothing = dict.fromkeys(model.parts, "disk")
    if mode == "speed":
        yield _planned(model, work, room, mode, everything)
    elif not room.on_gpu:
        if mode != "minimal":
            yield _planned(model, work, room, mode, everything)
        yield _planned(model, work, room, mode, nothing)
    elif mode == "minimal":
        yield _planned(model, work, room, mode, nothing)
    else:
        hosted = _hosted(model, room)
        if mode == "auto":
            yield _planned(model, work, room, mode, everything)
            encoders = {role: home for role, home in hosted.items() if role in ("text_encoder", "image_encoder")}
            yield _planned(model, work, room, mode, {**everything, **encoders})
        yield _planned(model, work, room, mode, hosted)
        yield _planned(model, work, room, mode, _hosted(model, room, apart=True))


def _hosted(model: Model, room: Room, apart: bool = False) -> dict[str, str]:
    """Homes on the host for as long as there is room, those first that are used most.

    Args:
        apart: keep room for what any of the others takes there while it is read.
    """
    free, homes = room.usable_host, dict.fromkeys(model.parts, "disk")
    for role in (*model.nets, "vae", "image_encoder", "text_encoder"):
        if role in model.parts:
            others = [size.converted for other, size in model.parts.items() if homes[other] == "disk" and other != role]
            if model.parts[role].total + (max(others, default=0) if apart else 0) <= free:
                homes[role] = "host"
                free -= model.parts[role].total
    return homes


def _planned(model: Model, work: Work, room: Room, mode: str, homes: Mapping[str, str]) -> Plan:
    """With these homes: as many blocks on the device as fit, VAE tiles as needed."""
    usable = room.usable
    least = mode == "minimal"
    denoising, decoding = room.spread("denoise"), room.spread("decode")
    stays = sum(size.total for role, size in model.parts.items() if homes[role] == "gpu")
    locked = int(room.host * PINNED_SHARE)
    places = {}
    for role in sorted(model.parts, key=lambda role: role not in model.nets):
        size, home, resident = model.parts[role], homes[role], 0
        if home != "gpu" and room.on_gpu and size.blocks and role in model.nets and not least:
            spare = usable - stays - int(denoising * denoise_bytes(model.config, work, told=False))
            resident = _most_blocks(size, spare)
        if not room.on_gpu or home == "gpu":
            resident = len(size.blocks)
        pinned = room.on_gpu and home == "host" and size.total <= locked
        locked -= size.total if pinned else 0
        places[role] = Place(home, size.total, len(size.blocks), resident, pinned)

    def comes(role: str) -> int:
        """Bytes of a part in use beyond what stays there anyway."""
        place, size = places[role], model.parts[role]
        if place.home == "gpu":
            return 0
        if not place.streamed:
            return size.total
        spare = sum(sorted(size.blocks)[-place.resident :]) if place.resident else 0
        return size.rest + spare + min(2, place.blocks - place.resident) * size.largest_block

    told = not any(places[role].hosted for role in model.nets)
    weights = stays + max(comes(role) for role in model.nets)
    denoise = weights + int(denoising * denoise_bytes(model.config, work, told))
    text = stays + comes("text_encoder") + text_bytes(model.text_width, work)
    prepared = max(model.parts[role].largest_block + model.parts[role].rounding for role in model.nets)
    early = not least and any(homes[role] != "disk" for role in model.nets) and text + prepared <= usable
    beside = stays + comes("vae")  # what there is besides the VAE's own work
    fastest, whole = decode_grids(model.coder, work)
    grid, decode_budget, encode_budget = whole if least else fastest, None, None
    if work.kernels:
        encode_budget = max(0, usable - beside - encode_fixed(model.coder, work))
        most = int((usable - beside) / decoding)
        if least:
            most = min(most, decode_bytes(model.coder, work, whole))
        decode_budget, grid = _decoding(model.coder, work, most)
    condition = 0
    if work.encodes_image:
        condition = beside + encode_bytes(model.coder, work, encode_budget)
        if "image_encoder" in model.parts:
            condition = max(condition, stays + comes("image_encoder") + IMAGE_ENCODER_WORK)
    longer = not room.on_gpu or max(condition, denoise) + prepared <= usable
    peaks = {
        "text": text,
        "condition": condition,
        "denoise": denoise,
        "switch": denoise if len(model.nets) > 1 else 0,
        "decode": beside + int(decoding * decode_bytes(model.coder, work, grid)),
    }
    host = _on_host(model, places)
    return Plan(mode, room, places, peaks, decode_budget, encode_budget, grid, early, longer, host)


def _on_host(model: Model, places: Mapping[str, Place]) -> int:
    """Bytes of the parts that live there, and of what the one that takes most takes beyond that while it is read."""
    lives = {role: place.nbytes if place.home == "host" else 0 for role, place in places.items()}
    beyond = [model.parts[role].converted - lives[role] for role, place in places.items() if place.hosted]
    return sum(lives.values()) + max([0, *beyond])


def _decoding(coder: Coder, work: Work, spare: int) -> tuple[int, Grid]:
    """Bytes for the VAE's later layers, of what decoding may take in all, and the tiles that come of it."""
    for grid in decode_grids(coder, work):
        budget = max(0, spare - decode_fixed(coder, work) - piece_bytes(work, grid))
        chosen = decode_grid(coder, work, budget)
        if chosen.whole:
            break
    return budget, chosen


def _most_blocks(size: PartSize, spare: int) -> int:
    """How many blocks may stay beside two that come and go: all, where there is room for all."""
    if size.total <= spare:
        return len(size.blocks)
    for_blocks = spare - size.rest - 2 * size.largest_block
    return max(0, min(len(size.blocks) - 1, for_blocks // max(1, size.largest_block)))
