"""Latent shards: what is written comes back bit by bit, WebDataset reads it, and nothing damaged gets through."""

from __future__ import annotations

import io
import os
import random
import resource
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from turbowan.errors import CheckpointError
from turbowan.train import shard_writer
from turbowan.train.shard_writer import write_shards
from turbowan.train.shards import Sample, Shards

Make = Callable[[range], Iterator[Sample]]


def sample(number: int, frames: int = 3, image: bool = False, dtype: torch.dtype = torch.bfloat16) -> Sample:
    """The clip of a number, the same whenever it is made."""
    draw = torch.Generator().manual_seed(number)
    shapes = ((16, frames, 4, 6), (8, 32), (20, frames, 4, 6))
    latent, text, condition = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    return Sample(latent, text, f"clip {number}: très grand, 色调", condition if image else None)


def make(numbers: range) -> Iterator[Sample]:
    return (sample(number) for number in numbers)


def assert_same(ours: Sample, theirs: Sample) -> None:
    assert ours.prompt == theirs.prompt
    for member in ("latent", "text", "condition"):
        a, b = getattr(ours, member), getattr(theirs, member)
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == torch.bfloat16
            assert torch.equal(a.view(torch.int16), b.bfloat16().contiguous().view(torch.int16)), member


def rewrite(source: Path, target: Path, change: Callable[[str, bytes], Sequence[tuple[str, bytes]]]) -> Path:
    """A copy of a tar with each member (name, content) replaced by what `change` makes of it."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for info in old.getmembers():
            for name, data in change(info.name, old.extractfile(info).read()):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))
    return target


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("image", [False, True])
def test_clips_come_back_bit_by_bit(image: bool, tmp_path: Path, fresh_seed: int) -> None:
    clips = [sample(fresh_seed + number, image=image, dtype=torch.float32) for number in range(23)]
    odd = torch.tensor([-0.0, 1e-40, 3e38, -1e-45])
    clips[3].latent[0, 0, 0, :4] = odd
    seen: list[tuple[int, int]] = []
    paths = write_shards(lambda ns: (clips[n] for n in ns), 23, tmp_path / "a", 10, lambda *at: seen.append(at))
    assert [path.name for path in paths] == ["shard_000000.tar", "shard_000001.tar", "shard_000002.tar"]
    assert sorted(os.listdir(tmp_path / "a")) == [path.name for path in paths]
    assert seen == [(done, 23) for done in range(1, 24)]
    shards = Shards(tmp_path / "a")
    order = random.Random(fresh_seed).sample(range(23), 23)
    for number in order:
        assert_same(shards[number], clips[number])
    listed = "latent 16x3x4x6, text 8x32" + (", condition 20x3x4x6" if image else "")
    assert str(shards) == f"23 clips in 3 shards: {listed}"
    assert shards.keys == [f"{number:09d}" for number in range(23)]
    with tarfile.open(paths[2]) as tar:
        members = ["latent.pt", "embed.pt", "prompt.txt"] + ["condition.pt"] * image
        assert tar.getnames() == [f"{number:09d}.{member}" for number in (20, 21, 22) for member in members]


def test_views_are_saved_alone(tmp_path: Path) -> None:
    whole = sample(0)
    batch = torch.randn(50, *whole.latent.shape)
    write_shards(lambda _: [Sample(batch[7].transpose(2, 3), whole.text, "")], 1, tmp_path)
    assert (tmp_path / "shard_000000.tar").stat().st_size < batch[0].nbytes + 30_000
    assert torch.equal(Shards(tmp_path)[0].latent, batch[7].transpose(2, 3).bfloat16())


def test_webdataset_reads_what_is_written(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    paths = write_shards(make, 7, tmp_path, 4)
    data = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False)
    for number, found in enumerate(data):
        tensors = [torch.load(io.BytesIO(found[name]), weights_only=True) for name in ("latent.pt", "embed.pt")]
        assert found["__key__"] == f"{number:09d}"
        assert_same(Sample(*tensors, found["prompt.txt"].decode()), sample(number))
    assert number == 6


def test_files_folders_patterns_and_lists(tmp_path: Path) -> None:
    a, b = write_shards(make, 6, tmp_path / "a[1]", 3), write_shards(make, 4, tmp_path / "b", 4)
    (tmp_path / "b" / ".shard_000001.99.part.tar").write_bytes(b"half")
    (tmp_path / "b" / "notes.txt").write_text("no shard")
    for paths, files in (
        (a[1], a[1:]),
        (str(a[1]), a[1:]),
        (tmp_path / "a[1]", a),
        (tmp_path / "b", b),
        (str(tmp_path / "b" / "*.tar"), b),
        (str(tmp_path / "*" / "shard_000000.tar"), [a[0], b[0]]),
        ([tmp_path / "b", a[1]], [*b, a[1]]),
        ([a[1], tmp_path / "a[1]", str(tmp_path / "*" / "*.tar"), tmp_path / "a[1]" / ".." / "b"], [a[1], a[0], *b]),
    ):
        shards = Shards(paths)
        assert shards.files == files
        assert len(shards) == sum(4 if path in b else 3 for path in files)
    assert_same(Shards([*b, a[1]])[5], sample(4))


def test_merged_shards_in_folders(tmp_path: Path) -> None:
    """As the official `merge_tar_shards.py` writes them: KEY/KEY.latent.pt, and a key again from another set."""
    (path,) = write_shards(make, 3, tmp_path / "a")
    other = rewrite(path, tmp_path / "other.tar", lambda name, data: [(f"{name[:9]}/{name}", data)])
    twice = tmp_path / "twice.tar"
    twice.write_bytes(other.read_bytes())
    with tarfile.open(other) as old, tarfile.open(twice, "a") as new:
        for info in old.getmembers()[6:]:  # 2 again, right behind 2
            new.addfile(info, old.extractfile(info))
    shards = Shards(twice)
    assert shards.keys == ["000000000", "000000001", "000000002", "000000002"]
    for number, source in enumerate((0, 1, 2, 2)):
        assert_same(shards[number], sample(source))


def test_other_members_do_not_matter(tmp_path: Path) -> None:
    (path,) = write_shards(make, 2, tmp_path / "a")
    more = rewrite(path, tmp_path / "more.tar", lambda name, data: [(f"{name[:9]}.json", b"{}"), (name, data)])
    assert_same(Shards(more)[1], sample(1))


def test_the_first_latent_frames(tmp_path: Path) -> None:
    write_shards(lambda numbers: (sample(n, image=True) for n in numbers), 3, tmp_path)
    shards = Shards(tmp_path, frames=2)
    assert shards.shapes == {"latent": (16, 2, 4, 6), "text": (8, 32), "condition": (20, 2, 4, 6)}
    full = sample(1, image=True)
    assert_same(shards[1], Sample(full.latent[:, :2], full.text, full.prompt, full.condition[:, :2]))
    with pytest.raises(CheckpointError, match=r"000000000\.condition\.pt has 3 latent frames, fewer than the 4"):
        Shards(tmp_path, frames=4)
    with pytest.raises(CheckpointError, match=r"at least one latent frame.* got 0"):
        Shards(tmp_path, frames=0)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    made: list[int] = []

    def dies_at(last: int) -> Make:
        def clips(numbers: range) -> Iterator[Sample]:
            for number in numbers:
                if number == last:
                    raise KeyboardInterrupt
                made.append(number)
                yield sample(number)

        return clips

    with pytest.raises(KeyboardInterrupt):
        write_shards(dies_at(9), 14, tmp_path, 4)
    assert sorted(os.listdir(tmp_path)) == ["shard_000000.tar", "shard_000001.tar"]
    made.clear()
    seen: list[tuple[int, int]] = []
    write_shards(dies_at(-1), 14, tmp_path, 4, lambda *at: seen.append(at))
    assert made == list(range(8, 14))
    assert seen == [(done, 14) for done in (4, 8, *range(9, 15))]
    whole = {path.name: path.read_bytes() for path in write_shards(make, 14, tmp_path / "whole", 4)}
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == whole
    made.clear()
    (tmp_path / "shard_000001.tar").unlink()  # a lost one is made again, a short last one made longer
    write_shards(dies_at(-1), 15, tmp_path, 4)
    assert made == [4, 5, 6, 7, 12, 13, 14]
    shards = Shards(tmp_path)
    assert shards.keys == [f"{number:09d}" for number in range(15)]
    for number in range(15):
        assert_same(shards[number], sample(number))


def test_processes_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "world_size", lambda: 2)
    for rank, shards in ((1, [1, 3]), (0, [0, 1, 2, 3])):
        monkeypatch.setattr(shard_writer, "rank", lambda rank=rank: rank)
        paths = write_shards(make, 7, tmp_path, 2)
        assert [shard for shard, path in enumerate(paths) if path.exists()] == shards
    assert Shards(tmp_path).keys == [f"{number:09d}" for number in range(7)]


def test_a_full_disk_leaves_the_shards_before(tmp_path: Path) -> None:
    write_shards(make, 4, tmp_path, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "shard_000000.tar").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        with pytest.raises(CheckpointError, match=r"cannot write .*shard_000000\.tar: File too large"):
            write_shards(make, 9, tmp_path / "new", 9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path / "new") == []
    assert len(Shards(tmp_path)) == 4


def test_what_cannot_be_written(tmp_path: Path) -> None:
    def one(change: Callable[[Sample], Sample]) -> Make:
        return lambda numbers: (change(sample(n)) if n == 5 else sample(n) for n in numbers)

    def nan(clip: Sample) -> Sample:
        clip.latent[3, 1, 2] = float("nan")
        return clip

    def short(clip: Sample) -> Sample:
        return Sample(clip.latent, clip.text, "", sample(0, frames=2, image=True).condition)

    refused: dict[str, tuple[Make, int, int]] = {
        r"shard_000001\.tar: 000000005\.latent\.pt holds 6 NaN or Inf among 1,152 values": (one(nan), 8, 4),
        r"000000005\.latent\.pt has shape \[16, 2, 4, 6\], the first clip's is \[16, 3, 4, 6\]":
            (one(lambda _: sample(5, frames=2)), 8, 4),
        r"000000005\.condition\.pt is there, and the first clip has none":
            (one(lambda _: sample(5, image=True)), 8, 4),
        r"000000005\.embed\.pt has shape \[1, 8, 32\], expected \[L, D\]":
            (one(lambda clip: Sample(clip.latent, clip.text[None], "")), 8, 4),
        r"000000000\.latent\.pt has shape \[20, 3, 4, 6\], expected \[16, T, h, w\]":
            (lambda numbers: (Sample(sample(n, image=True).condition, sample(n).text, "") for n in numbers), 4, 4),
        r"000000000\.condition\.pt is of size \[2, 4, 6\], its latent of \[3, 4, 6\]":
            (lambda numbers: (short(sample(n)) for n in numbers), 4, 4),
        "at least one clip must be written, and one a shard; got 0 and 4": (make, 0, 4),
        "got 4 and 0": (make, 4, 0),
    }  # fmt: skip
    for i, (message, arguments) in enumerate(refused.items()):
        with pytest.raises(CheckpointError, match=message) as error:
            write_shards(arguments[0], arguments[1], tmp_path / str(i), arguments[2])
        assert "\n" not in str(error.value)
        assert all(path.name == "shard_000000.tar" for path in tmp_path.glob(f"{i}/*"))  # the whole one before, at most
    write_shards(make, 8, tmp_path / "b", 4)
    with pytest.raises(CheckpointError, match=r"shard_000000\.tar holds clips 0+ to 0+3, not 0+ to 0+1: .* another"):
        write_shards(make, 8, tmp_path / "b", 2)
    with pytest.raises(CheckpointError, match=r"first clip's is \[16, 3, 4, 6\]"):  # of the run before
        write_shards(lambda numbers: (sample(n, frames=5) for n in numbers), 12, tmp_path / "b", 4)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made"):
        write_shards(make, 8, tmp_path / "file" / "b")


def test_damaged_shards_are_one_line(tmp_path: Path) -> None:
    """The line names shard and clip; all that headers tell is found before training starts."""
    good, whole = write_shards(make, 8, tmp_path / "good", 4)
    data = whole.read_bytes()
    member = "000000006.embed.pt"
    with tarfile.open(whole) as tar:
        where = tar.getmember(member)
        nexts = tar.getmember("000000006.prompt.txt").offset
        last = tar.getmember("000000007.prompt.txt")

    def without(name: str) -> bytes:
        return rewrite(whole, tmp_path / "x.tar", lambda n, d: [] if n == name else [(n, d)]).read_bytes()

    early = {
        "missing": (without(member), r"bad\.tar: 000000006\.embed\.pt is missing"),
        "no prompt": (without("000000004.prompt.txt"), r"bad\.tar: 000000004\.prompt\.txt is missing"),
        "cut in a tensor": (data[: where.offset_data + 700], r"bad\.tar is cut off.*after 3 clips"),
        "cut in a header": (data[: nexts + 100], r"bad\.tar is cut off.*after 3 clips"),
        "cut between members": (data[:nexts], r"bad\.tar is cut off.*no header at byte"),
        "cut between clips": (data[: last.offset_data + 512], r"bad\.tar is cut off.*after 4 clips: no header at byte"),
        "a damaged header": (data[:nexts] + b"\x99" * 512 + data[nexts + 512 :], r"bad\.tar is cut off, damaged.*byte"),
        "empty": (b"", r"bad\.tar is cut off.*after 0 clips: empty file"),
        "text": (b"a shard? " * 99, r"bad\.tar is cut off, damaged or no plain tar"),
    }
    late = {
        "nan": (saved(torch.full((8, 32), float("nan")).bfloat16()), r"holds 256 NaN or Inf among 256 values"),
        "inf": (saved(sample(6).text.index_fill(0, torch.tensor([2]), float("inf"))), r"holds 32 NaN or Inf among 256"),
        "shape": (saved(sample(6).text[:5]), r"has shape \[5, 32\], the first clip's is \[8, 32\]"),
        "dimensions": (saved(sample(6).text[0]), r"has shape \[32\], expected \[L, D\]"),
        "dtype": (saved(torch.ones(8, 32, dtype=torch.int64)), "is int64, expected bfloat16"),
        "mapping": (saved({"x": torch.ones(3)}), "holds a dict, not a tensor"),
        "code": (saved(Path("x")), "is not a readable tensor"),
        "cut": (saved(sample(6).text)[:200], "is not a readable tensor"),
        "empty": (b"", "is not a readable tensor"),
    }
    bad = tmp_path / "bad.tar"
    for content, message in early.values():
        bad.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as error:
            Shards([good, bad])
        assert "\n" not in str(error.value)
    for content, message in late.values():
        rewrite(whole, bad, lambda n, d, content=content: [(n, content if n == member else d)])
        shards = Shards([good, bad])
        assert_same(shards[5], sample(5))
        with pytest.raises(CheckpointError, match=rf"bad\.tar: 000000006\.embed\.pt {message}") as error:
            shards[6]
        assert "\n" not in str(error.value)


def test_more_that_is_refused(tmp_path: Path) -> None:
    (path,) = write_shards(make, 3, tmp_path / "a")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(path)
    with tarfile.open(tmp_path / "none.tar", "w") as tar:
        tar.add(path, "000000000.mp4")
    words = "très".encode("latin-1")
    latin = rewrite(path, tmp_path / "latin.tar", lambda n, d: [(n, words if n.endswith("txt") else d)])
    extra = [("000000001.condition.pt", saved(sample(1, image=True).condition))]
    some = rewrite(path, tmp_path / "some.tar", lambda n, d: [(n, d)] + extra * (n == "000000001.embed.pt"))
    (tmp_path / "nothing").mkdir()
    for paths, message in (
        (tmp_path / "a.tar.gz", r"a\.tar\.gz is cut off, damaged or no plain tar"),
        (tmp_path / "none.tar", r"no clips in .*none\.tar: no names end in latent\.pt"),
        (latin, r"latin\.tar: 000000000\.prompt\.txt is not UTF-8"),
        (some, r"some\.tar: 000000001\.condition\.pt is there, and the first clip has none"),
        (tmp_path / "nothing", r"no \.tar shard at .*nothing"),
        (str(tmp_path / "gone*.tar"), r"no \.tar shard at .*gone\*\.tar"),
        ([path, tmp_path / "gone.tar"], r"no \.tar shard at .*gone\.tar"),
        ([], "no shards are given"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=message) as error:
            Shards(paths)
        assert "\n" not in str(error.value)
    shards = Shards(path)
    path.write_bytes(path.read_bytes()[:3000])  # after it was looked through
    with pytest.raises(CheckpointError, match=r"shard_000000\.tar: 000000002\.prompt\.txt is cut off after 0 of"):
        shards[2]
    path.unlink()
    with pytest.raises(CheckpointError, match=r"shard_000000\.tar cannot be read: No such file"):
        shards[1]
