"""Cases side by side: the same prompts, first pictures and noise for all, every answer judged and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..clock import Progress
from ..errors import MachineError, RequestError
from ..settings import Settings
from ..stages import to_uint8
from .case import Case
from .measure import change, mean_distance, pictures_psnr, relative_error
from .player import Player, Players
from .questions import Given, Questions
from .sheet import Sheet
from .summary import summarise

WORLD = "world"  # the name under which the world's own clips are judged: what a perfect model would reach
_OTHER_DRAW = 1_000_003  # between the seeds of clips of one prompt


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    batch: prompts generated together. seed: prompt r's noise has the seed `seed + r`. shard: (i, n),
    the i-th of n equal parts of the prompts, from 1. diversity: prompts of which `draws` clips are made. errors:
    prompts of which the latents are also computed in float32, dense. Both are spread evenly over all prompts.
    """

    batch: int
    seed: int = 0
    shard: tuple[int, int] = (1, 1)
    diversity: int = 0
    draws: int = 4
    errors: int = 0

    def __post_init__(self) -> None:
        part, parts = self.shard
        if self.batch < 1 or self.draws < 2 or min(self.diversity, self.errors, self.seed) < 0:
            raise RequestError(
                "a comparison takes a batch of at least 1, 2 draws or more, and no negative numbers; got"
                f" batch {self.batch}, draws {self.draws}, diversity {self.diversity}, errors {self.errors},"
                f" seed {self.seed}"
            )
        if not 1 <= part <= parts:
            raise RequestError(f"a shard i/n is from 1/n to n/n, got {part}/{parts}")

    def rows(self, total: int) -> range:
        """This shard's prompts."""
        part, parts = self.shard
        return range((part - 1) * total // parts, part * total // parts)

    def spread(self, count: int, total: int) -> list[int]:
        """This shard's share of `count` prompts spread over all of them."""
        count = min(count, total)
        mine = self.rows(total)
        return [row for row in (i * total // count for i in range(count)) if row in mine]


def compare(
    cases: Sequence[Case],
    against: str,
    questions: Questions,
    extent: Extent,
    players: Players,
    report: Callable[[Progress], None] = lambda _: None,
) -> tuple[dict[str, Any], Sheet]:
    """Ask all cases the same questions.

    Args:
        against: the name of the case (or WORLD) that the others are compared with.

    Returns:
        A part of a report (see `report`), with every prompt's numbers and their summary; and what to look at.

    Raises:
        RequestError: a model does not take such questions, or cases make videos of different sizes.
        MachineError: the GPU's memory does not hold a batch.
    """
    comparison = _Comparison(cases, against, questions, extent, players)
    rows, varied = comparison.rows, extent.spread(extent.diversity, len(questions.texts))
    try:
        for part in _batches(rows, extent.batch):
            comparison.ask(part)
            report(Progress(questions.what, part[-1] + 1 - rows.start, len(rows)))
        for part in _batches(varied, max(1, extent.batch // extent.draws)):
            comparison.ask_again(part)
            report(Progress("diversity", varied.index(part[-1]) + 1, len(varied)))
    except torch.OutOfMemoryError as error:
        raise MachineError(f"{extent.batch} prompts at a time do not fit the GPU's memory; lower --batch") from error
    frames, height, width = comparison.size
    result = {
        "asked": {
            **questions.asked, "seed": extent.seed, "frames": frames, "height": height, "width": width,
            "diversity": extent.diversity, "draws": extent.draws, "errors": extent.errors,
        },
        "against": against,
        "rows": list(rows),
        "texts": [questions.texts[row] for row in rows],
        "answers": {point: [names[row] for row in rows] for point, names in questions.answers.items()},
        "cases": comparison.results(),
    }  # fmt: skip
    return {**result, "summary": summarise(result)}, comparison.sheet


def _batches(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


class _Comparison:
    """Players, questions, and the numbers found so far."""

    def __init__(
        self, cases: Sequence[Case], against: str, questions: Questions, extent: Extent, players: Players
    ) -> None:
        self.against, self.questions, self.extent, self.players = against, questions, extent, players
        first = sorted(cases, key=lambda case: case.name != against)  # the one that the others' frames are held against
        self.cast = {case.name: players.player(case) for case in first}
        self.size = _common_size(self.cast, questions)
        self.device = next(iter(self.cast.values())).how.device
        self.rows = extent.rows(len(questions.texts))
        self.measured = set(extent.spread(extent.errors, len(questions.texts)))
        self.tables = {name: _Table(self.rows) for name in (WORLD, *(case.name for case in cases))}
        self.sheet = Sheet()

    def ask(self, rows: Sequence[int]) -> None:
        """One clip of each prompt, by every case."""
        given = self.questions.give(rows, self.size, self.device)
        texts = [self.questions.texts[row] for row in rows]
        seeds = [self.extent.seed + row for row in rows]
        if given.pictures is not None:
            shown = given.pictures.unsqueeze(2) if given.clips is None else given.clips
            self.sheet.add("given", texts, to_uint8(shown))
        if given.clips is not None:
            self._judge(WORLD, to_uint8(given.clips), rows)
        exact = _Exact(self.players, [i for i, row in enumerate(rows) if row in self.measured], texts, seeds, given)
        reference = None
        for name, player in self.cast.items():
            latents = player.latents(texts, seeds, given.pictures)
            video = player.videos(latents)
            if name == self.against:
                reference = video
            elif reference is not None:
                self.tables[name].put("frames_psnr", rows, pictures_psnr(video, reference))
            self.sheet.add(name, texts, video, self._judge(name, video, rows))
            if given.pictures is not None:
                wanted, put = to_uint8(given.pictures), self.tables[name].put
                put("psnr", rows, pictures_psnr(video[:, :, 0], wanted))
                put("vae_psnr", rows, pictures_psnr(player.reconstruct(given.pictures), wanted))
            self.tables[name].put("error", [rows[i] for i in exact.samples], exact.errors(player, latents))

    def _judge(self, name: str, video: Tensor, rows: Sequence[int]) -> Tensor:
        """Judge uint8 clips; returns which are right in everything."""
        clips = video.float() / 127.5 - 1
        right, travel = self.questions.judge(clips, rows)
        right["all"] = torch.stack(list(right.values())).all(dim=0)
        table = self.tables[name]
        table.judged(right)
        directions = self.questions.answers["direction"]
        moving = [i for i, row in enumerate(rows) if directions[row] != "still"]
        moved = [rows[i] for i in moving]
        table.put("travel", moved, travel[moving].tolist())
        table.put("change", moved, change(clips)[moving].tolist())
        return right["all"]

    def ask_again(self, rows: Sequence[int]) -> None:
        """Several clips of each prompt, which differ in their noise alone."""
        draws = self.extent.draws
        given = self.questions.give(rows, self.size, self.device)
        pictures = None if given.pictures is None else given.pictures.repeat_interleave(draws, dim=0)
        texts = [self.questions.texts[row] for row in rows for _ in range(draws)]
        seeds = [self.extent.seed + row + draw * _OTHER_DRAW for row in rows for draw in range(draws)]
        for name, player in self.cast.items():
            videos = player.videos(player.latents(texts, seeds, pictures))
            self.tables[name].put("diversity", rows, mean_distance(videos.unflatten(0, (len(rows), draws))).tolist())

    def results(self) -> dict[str, Any]:
        return {
            name: {
                "facts": self.cast[name].facts() if name in self.cast else {},
                "right": table.right,
                "values": {key: values for key, values in table.values.items() if any(v is not None for v in values)},
            }
            for name, table in self.tables.items()
            if table.right
        }


class _Exact:
    """Float32 dense latents of some samples of a batch, from the same noise; computed once for all cases alike."""

    def __init__(
        self, players: Players, samples: list[int], texts: Sequence[str], seeds: Sequence[int], given: Given
    ) -> None:
        self.players, self.samples = players, samples
        self.texts, self.seeds = [texts[i] for i in samples], [seeds[i] for i in samples]
        self.pictures = None if given.pictures is None else given.pictures[samples]
        self._known: dict[tuple[str, Settings], Tensor] = {}

    def errors(self, player: Player, latents: Tensor) -> list[float]:
        """Of these samples of a batch's latents."""
        if not self.samples:
            return []
        exact = self.players.in_float32_dense(player)
        if exact is player:
            return [0.0] * len(self.samples)
        key = (exact.case.model, exact.settings)
        if key not in self._known:
            self._known[key] = exact.latents(self.texts, self.seeds, self.pictures)
        return relative_error(latents[self.samples], self._known[key]).tolist()


def _common_size(cast: dict[str, Player], questions: Questions) -> tuple[int, int, int]:
    for name, player in cast.items():
        if player.engine.needs_image != questions.from_pictures:
            kind, command = ("image", "i2v") if player.engine.needs_image else ("text", "prompts")
            raise RequestError(f"case '{name}' is {kind}-to-video; take `turbowan evaluate {command}`")
    sizes = {player.size: name for name, player in cast.items()}
    if len(sizes) > 1:
        told = [f"{frames} frames of {w}x{h} ('{name}')" for (frames, h, w), name in sizes.items()]
        raise RequestError(f"cases must make videos of one size, got {told[0]} and {told[1]}")
    return next(iter(sizes))


class _Table:
    """One case's numbers by prompt. values: None where a number was not asked for or could not be had."""

    def __init__(self, rows: range) -> None:
        self.rows = rows
        self.right: dict[str, list[bool]] = {}
        self.values: dict[str, list[float | None]] = {}

    def judged(self, right: dict[str, Tensor]) -> None:
        for point, values in right.items():
            self.right.setdefault(point, []).extend(values.tolist())

    def put(self, name: str, rows: Sequence[int], values: Sequence[float]) -> None:
        column = self.values.setdefault(name, [None] * len(self.rows))
        for row, value in zip(rows, values, strict=True):
            column[row - self.rows.start] = float(f"{value:.5g}") if value == value else None
