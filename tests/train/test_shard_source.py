"""Batches from shards: each clip once an epoch, the same whoever asks and whenever, and read ahead."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbowan.errors import CheckpointError
from turbowan.models.transformer import TransformerConfig, WanTransformer
from turbowan.train.data import Batch, Source
from turbowan.train.shard_source import NEGATIVE_FILE, ShardSource
from turbowan.train.shard_writer import write_shards
from turbowan.train.shards import Sample, Shards

CPU = torch.device("cpu")
CLIPS = 17


def sample(number: int) -> Sample:
    draw = torch.Generator().manual_seed(number)
    shapes = ((16, 3, 4, 6), (8, 32), (20, 3, 4, 6))
    latent, text, condition = (torch.randn(shape, generator=draw).bfloat16() for shape in shapes)
    return Sample(latent, text, f"clip {number}", condition)


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    """17 clips in four shards, with conditions."""
    write_shards(lambda numbers: map(sample, numbers), CLIPS, tmp_path / "data", 5)
    return Shards(tmp_path / "data")


@pytest.fixture
def source(shards: Shards, fresh_seed: int) -> Iterator[Callable[..., ShardSource]]:
    """Makes sources of these shards with a seed of this test, and ends their threads."""
    made: list[ShardSource] = []

    def make(batch: int = 4, **options: object) -> ShardSource:
        made.append(ShardSource(shards, batch, CPU, **{"seed": fresh_seed, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def padded(text: Tensor) -> Tensor:
    """A text as the network gets it: a row stands for the empty end of the 512."""
    return torch.cat([text.float(), torch.zeros(1, 32)])


def which(batch: Batch) -> list[int]:
    """The numbers of a batch's clips, by their latents; text and condition must be theirs."""
    clips = [sample(number) for number in range(CLIPS)]
    found = []
    for latent, text, condition in zip(batch.latents, batch.text, batch.condition, strict=True):
        (number,) = (i for i, clip in enumerate(clips) if torch.equal(latent, clip.latent.float()))
        assert torch.equal(text, padded(clips[number].text))
        assert torch.equal(condition, clips[number].condition.float())
        found.append(number)
    return found


@pytest.mark.parametrize("batch", [1, 4, CLIPS])
def test_every_clip_once_an_epoch_in_a_new_order(batch: int, source: Callable[..., ShardSource]) -> None:
    data = source(batch)
    line = [number for step in range(3 * CLIPS) for number in data.numbers(step, range(batch))]
    epochs = [line[i : i + CLIPS] for i in range(0, 3 * CLIPS * batch, CLIPS)]
    assert all(sorted(epoch) == list(range(CLIPS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert line[:CLIPS] != list(range(CLIPS))
    assert line[: 2 * CLIPS] != [n for step in range(2 * CLIPS) for n in source(1, seed=1).numbers(step, range(1))]
    for step in range(3):
        read = data.batch(step, range(batch))
        assert read.latents.dtype == read.text.dtype == read.condition.dtype == torch.float32
        assert which(read) == line[step * batch : (step + 1) * batch]


def test_the_order_is_shuffled_over_all_shards(source: Callable[..., ShardSource]) -> None:
    """Any clip may come at any place: over 400 epochs each place sees each clip about as often."""
    data, counts = source(1), Counter()
    for epoch in range(400):
        counts.update(enumerate(data.numbers(epoch * CLIPS + place, range(1))[0] for place in range(CLIPS)))
    expected = 400 / CLIPS
    chi = sum((counts[place, clip] - expected) ** 2 / expected for place in range(CLIPS) for clip in range(CLIPS))
    freedom = (CLIPS - 1) ** 2
    assert abs(chi - freedom) < 6 * (2 * freedom) ** 0.5


def test_a_step_is_the_same_whenever_and_by_whom_it_is_asked(source: Callable[..., ShardSource]) -> None:
    whole = source(6)
    steps = {step: which(whole.batch(step, range(6))) for step in range(8)}
    ranks = [source(6), source(6)]  # two processes, of which one takes its rows in two parts
    for step in (5, 6, 7):  # a resumed run
        parts = [which(ranks[row // 4].batch(step, range(row, row + 2))) for row in (0, 2, 4)]
        assert [number for part in parts for number in part] == steps[step]
    for step in random.Random(whole.seed).sample(range(8), 8):  # any order, any rows
        rows = range(2, 5)
        assert which(whole.batch(step, rows)) == steps[step][2:5]
    with pytest.raises(ValueError, match="rows"):
        whole.batch(0, range(4, 7))


def test_only_the_rows_asked_for_are_read_and_before_they_are(
    source: Callable[..., ShardSource], shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, str]] = []
    original = Shards.__getitem__

    def watched(self: Shards, number: int) -> Sample:
        read.append((number, threading.current_thread().name))
        return original(self, number)

    monkeypatch.setattr(Shards, "__getitem__", watched)
    data = source(6)
    rows = range(3, 6)
    wanted = [data.numbers(step, rows) for step in range(4)]
    for step in range(3):
        data.batch(step, rows)
        due = time.monotonic() + 20
        while len(read) < 3 * (step + 2):  # the next step's rows come without being asked for
            assert time.monotonic() < due
            time.sleep(0.002)
    assert Counter(number for number, _ in read) == Counter(number for numbers in wanted for number in numbers)
    assert all("read-clips" in thread for _, thread in read)


def test_a_bad_clip_is_told_at_its_own_step(source: Callable[..., ShardSource], shards: Shards) -> None:
    data = source(2)
    bad = data.numbers(3, range(2))[0]
    start = int(shards._places[bad, 0, 0])
    path = shards.files[shards._file[bad]]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\0" * 64)
    for step in range(3):
        data.batch(step, range(2))
    with pytest.raises(CheckpointError, match=rf"{path.name}: {bad:09d}\.latent\.pt is not a readable tensor"):
        data.batch(3, range(2))


def test_the_negative_text(source: Callable[..., ShardSource], shards: Shards, tmp_path: Path) -> None:
    closed = torch.cat([torch.randn(4, 32), torch.zeros(1, 32)]).bfloat16()
    assert torch.equal(source(negative=closed).negative, closed[None].float())
    opened = torch.randn(5, 32)  # of as many rows as tokens: an empty one stands for the rest
    assert torch.equal(source(negative=opened).negative, torch.cat([opened, torch.zeros(1, 32)])[None])
    full = torch.randn(512, 32).bfloat16()
    torch.save(full, tmp_path / "official.pt")
    data: Source = source(negative=tmp_path / "official.pt")
    assert torch.equal(data.negative, full[None].float())
    beside = shards.files[0].with_name(NEGATIVE_FILE)
    assert torch.equal(source().batch(0, range(1)).text[0], padded(sample(source().numbers(0, range(1))[0]).text))
    with pytest.raises(CheckpointError, match=r"negative\.pt does not exist; guidance needs"):
        _ = source().negative
    torch.save(closed[None], beside)
    assert torch.equal(source().negative, closed[None].float())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(4, 33), r"shape \[4, 33\], expected 1 to 512 rows of the shards' width 32"),
        (torch.zeros(513, 32), r"shape \[513, 32\], expected 1 to 512 rows"),
        (torch.zeros(2, 4, 32), r"shape \[2, 4, 32\], expected"),
        (torch.zeros(32), r"shape \[32\], expected"),
        (torch.full((3, 32), float("nan")), "holds 96 NaN or Inf"),
        ({"x": torch.zeros(3)}, "holds a dict, not a tensor"),
    ],
)
def test_negative_texts_that_are_refused(
    value: Tensor, message: str, source: Callable[..., ShardSource], tmp_path: Path
) -> None:
    torch.save(value, tmp_path / "n.pt")
    with pytest.raises(CheckpointError, match=rf"n\.pt.* {message}") as error:
        _ = source(negative=tmp_path / "n.pt").negative
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows", [3, 511, 512])
def test_what_a_text_leaves_out_is_zero(rows: int, tmp_path: Path, fresh_seed: int) -> None:
    """Whether its last row is a token's or empty, a network makes the same of it as of all 512 rows."""
    texts = [torch.randn(rows, 32).bfloat16() for _ in range(2)]
    texts[1][-1] = 0
    write_shards(lambda numbers: (Sample(sample(n).latent, texts[n], "") for n in numbers), 2, tmp_path)
    source = ShardSource(Shards(tmp_path), 2, CPU, seed=fresh_seed)
    batch, numbers = source.batch(0, range(2)), source.numbers(0, range(2))
    source.close()
    assert batch.text.shape == (2, min(rows + 1, 512), 32)
    whole = torch.stack([torch.cat([texts[n].float(), torch.zeros(512 - rows, 32)]) for n in numbers])
    net = WanTransformer(TransformerConfig(dim=128, ffn_dim=128, num_layers=1, text_dim=32))
    with torch.no_grad():
        short, full = (net(batch.latents, torch.full((2,), 500.0), text, text_rows=512) for text in (batch.text, whole))
    assert torch.allclose(short, full, atol=1e-5)


@pytest.mark.parametrize("batch", [0, CLIPS + 1])
def test_a_batch_that_the_clips_do_not_fill(batch: int, source: Callable[..., ShardSource]) -> None:
    with pytest.raises(CheckpointError, match=rf"batch of {batch} clips is no part of the 17 in 4 shards; .* 1 to 17"):
        source(batch)


def test_a_transformer_takes_what_comes(source: Callable[..., ShardSource]) -> None:
    data = source(3, negative=torch.zeros(1, 32))
    net = WanTransformer(TransformerConfig(dim=128, ffn_dim=128, num_layers=1, text_dim=32, in_dim=36))
    batch = data.batch(0, range(3))
    with torch.no_grad():
        for text in (batch.text, data.negative.expand(3, -1, -1)):
            velocity = net(batch.latents, torch.full((3,), 500.0), text, batch.condition, text_rows=512)
            assert velocity.shape == batch.latents.shape
            assert velocity.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu(shards: Shards, source: Callable[..., ShardSource]) -> None:
    there = ShardSource(shards, 4, torch.device("cuda"), seed=source().seed)
    for step in range(12):
        ours, theirs = there.batch(step, range(4)), source(4).batch(step, range(4))
        assert ours.latents.is_cuda
        for a, b in ((ours.latents, theirs.latents), (ours.text, theirs.text), (ours.condition, theirs.condition)):
            assert torch.equal(a.cpu(), b)
    there.close()
