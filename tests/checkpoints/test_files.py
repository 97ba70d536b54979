"""Tensor files: what is written comes back, and nothing that is no such file gets through."""

from __future__ import annotations

import json
import os
import pickle
import random
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbowan.checkpoints.files import file_identity, read_tensors, replacing, stream_tensors, write_tensors
from turbowan.errors import CheckpointError

State = dict[str, Tensor]


@pytest.fixture
def state(fresh_seed: int) -> State:
    """Every dtype that files hold; odd sizes, no dimensions, no elements, no order in memory, shared memory."""
    base = torch.randn(7, 5)
    return {
        "f32": base,
        "transposed": base.T,
        "row": base[3],
        "f64": torch.randn(3, dtype=torch.float64),
        "bf16": torch.randn(3, 3).bfloat16(),
        "f16": torch.randn(5).half(),
        "e4m3": torch.randn(4, 3).to(torch.float8_e4m3fn),
        "e5m2": torch.randn(4, 3).to(torch.float8_e5m2),
        "i64": torch.randint(-9, 9, (3,)),
        "i32": torch.randint(-9, 9, (3,), dtype=torch.int32),
        "i16": torch.randint(-9, 9, (3,), dtype=torch.int16),
        "i8": torch.randint(-128, 127, (3, 1, 3), dtype=torch.int8),
        "u8": torch.randint(0, 255, (5,), dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "grad": torch.randn(2, requires_grad=True),
        "ключ": torch.zeros(1),
    }


def assert_same(ours: State, theirs: State) -> None:
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype), key
        assert torch.equal(ours[key].double(), value.detach().double()), key


@pytest.mark.parametrize("name", ["x.safetensors", "x.sft", "x.pth", "x.pt", "x.ckpt", "x.bin"])
def test_round_trip(name: str, tmp_path: Path, state: State) -> None:
    path = tmp_path / "new" / "folder" / name
    write_tensors(path, state)
    assert_same(read_tensors(path), state)
    if path.suffix in (".safetensors", ".sft"):
        assert_same(load_file(path), state)  # as the format's own reader sees it
    else:
        loaded = torch.load(path, weights_only=True)
        assert_same(loaded, state)
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in loaded.values())
    assert os.listdir(path.parent) == [name]


def test_widest_tensors_come_first_and_are_aligned(tmp_path: Path, state: State) -> None:
    write_tensors(tmp_path / "x.safetensors", state, {"note": "été"})
    data = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt", "note": "été"}
    assert all(entry["data_offsets"][0] % state[key].itemsize == 0 for key, entry in header.items())
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(data) - 8 - length


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(suffix: str, umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / f"x{suffix}", {"x": torch.zeros(3)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / f"x{suffix}").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_streaming_takes_tensors_in_any_order(suffix: str, tmp_path: Path, state: State) -> None:
    layout = {key: value.to("meta") for key, value in state.items()}
    keys = random.Random(torch.initial_seed()).sample(sorted(state), len(state))
    stream_tensors(tmp_path / f"x{suffix}", layout, ((key, state[key].detach()) for key in keys))
    assert_same(read_tensors(tmp_path / f"x{suffix}"), state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_an_interrupted_write_leaves_nothing(suffix: str, tmp_path: Path, state: State) -> None:
    path = tmp_path / f"x{suffix}"
    write_tensors(path, {"old": torch.ones(1)})

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "f32", state["f32"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream_tensors(path, {key: value.to("meta") for key, value in state.items()}, broken())
    assert os.listdir(tmp_path) == [path.name]
    assert set(read_tensors(path)) == {"old"}


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken.pth").mkdir()
    places = {tmp_path / "file" / "x.pth": "Not a directory|File exists", tmp_path / "taken.pth": "directory"}
    for path, reason in places.items():
        with pytest.raises(CheckpointError, match=f"cannot write .*{path.name}: .*({reason})") as error:
            write_tensors(path, {"x": torch.zeros(1)})
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"cannot write .*x\.txt: weights end in one of \.safetensors"):
        write_tensors(tmp_path / "x.txt", {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"complex64, which a \.safetensors file cannot hold"):
        write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1, dtype=torch.complex64)})
    assert sorted(os.listdir(tmp_path)) == ["file", "taken.pth"]


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="needs file size limits")
def test_a_full_disk(tmp_path: Path) -> None:
    """As a limit on file size: the line says so and nothing stays."""
    script = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from turbowan.checkpoints.files import write_tensors\n"
        "from turbowan.errors import CheckpointError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n        write_tensors(Path(path), {'x': torch.zeros(200_000)})\n"
        "    except CheckpointError as error:\n        print(error)\n"
    )
    paths = [str(tmp_path / "x.safetensors"), str(tmp_path / "x.pth")]
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True)
    for line, path in zip(done.stdout.splitlines(), paths, strict=True):
        assert line.startswith(f"cannot write {path}: ")
    assert os.listdir(tmp_path) == []


def test_replacing_keeps_the_old_file_on_errors(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")

    def write_half() -> None:
        with replacing(target) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert target.read_text() == "old"
    with replacing(target) as partial:
        assert partial.parent == target.parent
        assert partial.suffix == ".json"
        partial.write_text("new")
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["report.json"]


def test_reading_maps_the_file(tmp_path: Path) -> None:
    """A file of 80 MB costs no memory until its tensors are used."""
    script = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from turbowan.checkpoints.files import read_tensors\n"
        "def resident():\n"
        "    lines = open('/proc/self/status').readlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmRSS')) // 1024\n"
        "for path in sys.argv[1:]:\n"
        "    before = resident()\n"
        "    tensors = read_tensors(Path(path))\n"
        "    print(resident() - before)\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    paths = [tmp_path / "x.pth", tmp_path / "x.safetensors"]
    for path in paths:
        write_tensors(path, {str(i): torch.zeros(10, 1000, 1000, dtype=torch.bfloat16) for i in range(4)})
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True)
    assert all(int(megabytes) < 25 for megabytes in done.stdout.split()), done.stdout


def test_folders_and_shards(tmp_path: Path, state: State) -> None:
    keys = sorted(state)
    folder = tmp_path / "model"
    write_tensors(folder / "a.safetensors", {key: state[key] for key in keys[:8]})
    assert set(read_tensors(folder)) == set(keys[:8])
    write_tensors(folder / "b.safetensors", {key: state[key] for key in keys[8:]})
    with pytest.raises(CheckpointError, match=r"model holds 2 weight files \(a\..*, b\.safetensors\); name one"):
        read_tensors(folder)
    index = folder / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: "ab"[k in keys[8:]] + ".safetensors" for k in keys}}))
    assert_same(read_tensors(folder), state)
    assert_same(read_tensors(index), state)


class Bomb:
    """What an attacker would pickle: loading it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.path}",))


def damaged_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Bad files by what is wrong with them, and what the error says besides the path."""
    good = {"blocks.0.modulation": torch.randn(1, 6, 256), "head.modulation": torch.randn(1, 2, 256)}
    torch.save(good, folder / "good.pth")
    save_file(good, folder / "good.safetensors")
    bad: dict[str, tuple[Path, str]] = {}

    def put(name: str, message: str, content: bytes | None = None) -> Path:
        bad[name] = (folder / name, message)
        if content is not None:
            (folder / name).write_bytes(content)
        return folder / name

    for suffix in (".pth", ".safetensors"):
        whole = (folder / f"good{suffix}").read_bytes()
        put(f"missing{suffix}", "does not exist; check the path")
        put(f"empty{suffix}", r"is empty \(0 bytes\); download it again", b"")
        put(f"truncated{suffix}", f"{len(whole) * 2 // 3:,} bytes.*not a readable", whole[: len(whole) * 2 // 3])
        put(f"head{suffix}", "20 bytes.*not a readable", whole[:20])
        put(f"page{suffix}", "bytes", b"<!DOCTYPE html><html><body>Sign in to download</body></html>")
        with zipfile.ZipFile(put(f"renamed-zip{suffix}", "bytes.*not a readable"), "w") as archive:
            archive.writestr("readme.txt", "not a model")
    torch.save({"x": Bomb(folder / "fired")}, put("bomb.pth", "pickled objects other than tensors.*never code"))
    put("raw-bomb.pth", "pickled objects other than tensors.*never code", pickle.dumps(Bomb(folder / "fired")))
    torch.save(Bomb(folder / "fired"), put("bare-bomb.bin", "pickled objects other than tensors"))
    torch.save([torch.zeros(1)], put("list.pth", "holds a list, not a mapping"))
    torch.save({"epoch": 3, "lr": 0.1}, put("numbers.pth", r"holds no tensors \(keys: epoch, lr\)"))
    torch.save({1: torch.zeros(1)}, put("unnamed.pth", r"holds no tensors \(keys: 1\)"))
    put("model.gguf", r"ends in '\.gguf'; weights end in one of", b"GGUF")
    index = {"weight_map": {"x": "part-1.safetensors", "y": "part-2.safetensors"}}
    (folder / "shards").mkdir()
    save_file({"x": torch.zeros(1)}, folder / "shards" / "part-1.safetensors")
    put("shards/i.index.json", r"names 2 shards, of which part-2\.safetensors is missing", json.dumps(index).encode())
    (folder / "lacking").mkdir()
    save_file({"x": torch.zeros(1)}, folder / "lacking" / "part-1.safetensors")
    index = {"weight_map": {"x": "part-1.safetensors", "y": "part-1.safetensors"}}
    put("lacking/i.index.json", r"lists 1 tensors its shards lack, e\.g\. y", json.dumps(index).encode())
    for name, text in (("text", "no JSON"), ("list", "[1]"), ("map", '{"weight_map": 3}'), ("none", "{}")):
        put(f"{name}.index.json", "is not a shard index", text.encode())
    (folder / "no-weights").mkdir()
    put("no-weights", r"holds 0 weight files \(none\)")
    return bad


def test_bad_files(tmp_path: Path, fresh_seed: int) -> None:
    for name, (path, message) in damaged_files(tmp_path).items():
        with pytest.raises(CheckpointError, match=message) as error:
            read_tensors(path)
        assert str(path) in str(error.value), name
        assert "\n" not in str(error.value), name
        assert len(str(error.value)) < 600, name
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_random_damage_never_escapes(suffix: str, tmp_path: Path, fresh_seed: int) -> None:
    """Whatever bytes change, a file is read or refused in one line."""
    write_tensors(tmp_path / f"good{suffix}", {f"layer.{i}.weight": torch.randn(3, 3) for i in range(4)})
    whole = (tmp_path / f"good{suffix}").read_bytes()
    chance = random.Random(fresh_seed)
    path = tmp_path / f"bad{suffix}"
    lines = []
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 12)):
            damaged[chance.randrange(min(len(damaged), 1500))] = chance.randrange(256)
        path.write_bytes(damaged[: chance.randint(1, len(damaged))] if chance.random() < 0.3 else damaged)
        try:
            read_tensors(path)
        except CheckpointError as error:
            lines.append(str(error))
    assert len(lines) > 20
    assert not any("\n" in line for line in lines)


def test_nested_states(tmp_path: Path, state: State) -> None:
    for name in ("state_dict", "model", "module"):
        torch.save({name: state, "step": 3}, tmp_path / "x.pth")
        assert_same(read_tensors(tmp_path / "x.pth"), state)
    torch.save({"state_dict": {"model": state}}, tmp_path / "x.pth")
    assert_same(read_tensors(tmp_path / "x.pth"), state)


def test_identity_tells_files_apart(tmp_path: Path) -> None:
    """One file by itself; a folder or a shard index by all weights there."""
    one, index = tmp_path / "one.safetensors", tmp_path / "model.safetensors.index.json"
    for path in (one, index):
        path.write_bytes(b"weights")
    before = [file_identity(path) for path in (one, index, tmp_path)]
    assert before == [file_identity(path) for path in (one, index, tmp_path)]
    assert before[1] == before[2]
    os.utime(one, ns=(1, 1))
    assert all(file_identity(path) != was for path, was in zip((one, index, tmp_path), before, strict=True))
