"""Reads into a small pool, as for a GPU, with the CPU as the device: every byte, in any layout, in bounded memory."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbowan.checkpoints import transfer as module
from turbowan.checkpoints.assign import assign
from turbowan.checkpoints.files import read_tensors, write_tensors
from turbowan.checkpoints.load import load_transformer
from turbowan.checkpoints.mapped import FileMaps
from turbowan.checkpoints.transfer import Item, transfer
from turbowan.errors import CheckpointError

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.fixture(autouse=True)
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files then go through many chunks, cut within tensors and joined over several."""
    monkeypatch.setattr(module, "CHUNK", 1 << 12)
    monkeypatch.setattr(module, "SLOTS", 3)


def numbers() -> dict[str, Tensor]:
    """Tensors of all kinds, smaller than a chunk and much larger."""
    return {
        "large": torch.randn(70, 301),
        "half": torch.randn(5001).to(torch.bfloat16),
        "codes": torch.randint(-128, 128, (333, 77), dtype=torch.int8),
        "fp8": torch.randn(64, 100).to(torch.float8_e4m3fn),
        "one": torch.randn(()),
        "none": torch.empty(0, 4),
        **{f"small.{i}": torch.randn(random.randint(1, 40)) for i in range(50)},
    }


def bits(value: Tensor) -> Tensor:
    return value.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_bytes_of_a_file(tmp_path: Path, suffix: str) -> None:
    state = numbers()
    write_tensors(tmp_path / f"weights{suffix}", state)
    read = read_tensors(tmp_path / f"weights{suffix}")
    counted: list[int] = []
    (placed,) = transfer([{k: Item(v, v.dtype) for k, v in read.items()}], CPU, counted.append)
    assert placed.keys() == state.keys()
    for key, value in state.items():
        assert placed[key].dtype == value.dtype
        assert torch.equal(bits(placed[key]), bits(value)), key
        assert not placed[key].numel() or placed[key].data_ptr() != read[key].data_ptr()
    assert sum(counted) == sum(value.nbytes for value in state.values())
    assert len(counted) > 20


def test_conversion_and_groups(tmp_path: Path) -> None:
    state = numbers()
    write_tensors(tmp_path / "weights.safetensors", state)
    read = read_tensors(tmp_path / "weights.safetensors")
    to = {"large": torch.bfloat16, "half": torch.float32, "small.3": torch.float16}
    keys = [[k for i, k in enumerate(read) if i % 4 == n] for n in range(4)] + [[]]
    groups = [{k: Item(read[k], to.get(k, read[k].dtype)) for k in names} for names in keys]
    placed = list(transfer(groups, CPU))
    assert [list(group) for group in placed] == keys
    for group in placed:
        for key, value in group.items():
            assert torch.equal(bits(value), bits(state[key].to(to.get(key, state[key].dtype)))), key


@pytest.mark.parametrize("inference", [True, False])
def test_memory_and_views_go_the_same_way(tmp_path: Path, inference: bool) -> None:
    """Tensors that a reader made in memory, and views of mapped ones; in inference mode, as the engine loads, too."""
    whole = torch.randn(300, 40)
    write_tensors(tmp_path / "weights.safetensors", {"whole": whole})
    mapped = read_tensors(tmp_path / "weights.safetensors")["whole"]
    made = torch.randn(100, 60)
    items = {"rows": Item(mapped[17:91], torch.float32), "made": Item(made, torch.float64)}
    assert FileMaps().locate(mapped[17:91]) is not None
    assert FileMaps().locate(made) is None
    with torch.inference_mode(inference):
        (placed,) = transfer([items], CPU)
    assert torch.equal(placed["rows"], whole[17:91])
    assert torch.equal(placed["made"], made.double())


def test_without_the_systems_word_it_reads_through_the_mapping(tmp_path: Path, monkeypatch) -> None:
    state = numbers()
    write_tensors(tmp_path / "weights.safetensors", state)
    read = read_tensors(tmp_path / "weights.safetensors")
    monkeypatch.setattr(FileMaps, "locate", lambda self, tensor: None)
    (placed,) = transfer([{k: Item(v, v.dtype) for k, v in read.items()}], CPU)
    assert all(torch.equal(bits(placed[key]), bits(state[key])) for key in state)


def test_a_file_that_was_replaced_is_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    old, new = torch.randn(4000), torch.randn(4000)
    write_tensors(path, {"x": old})
    read = read_tensors(path)
    write_tensors(path, {"x": new})
    (placed,) = transfer([{"x": Item(read["x"], torch.float32)}], CPU)
    assert torch.equal(placed["x"], old)


def test_a_file_cut_short_meanwhile_is_named_with_numbers(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {"x": torch.randn(100_000)})
    read = read_tensors(path)
    os.truncate(path, 200_000)
    with pytest.raises(CheckpointError, match=r"weights.safetensors is cut short: 200,000 bytes, 20\d,\d{3} are want"):
        list(transfer([{"x": Item(read["x"], torch.float32)}], CPU))


def test_no_more_than_the_pool_is_read_ahead(tmp_path: Path, monkeypatch) -> None:
    write_tensors(tmp_path / "weights.safetensors", {"x": torch.randn(50_000)})
    read = read_tensors(tmp_path / "weights.safetensors")
    started: list[int] = []
    whole_read = module._read
    monkeypatch.setattr(module, "_read", lambda chunk, *rest: (started.append(chunk.size), whole_read(chunk, *rest)))
    ahead: list[int] = []
    done: list[int] = []

    def count(size: int) -> None:
        done.append(size)
        ahead.append(len(started) - len(done))

    list(transfer([{"x": Item(read["x"], torch.float32)}], CPU, count))
    assert len(done) > 40
    assert max(ahead) <= module.SLOTS


def test_a_transformer_arrives_block_by_block(small_i2v: Path) -> None:
    """Each block is whole when it is handed over, the next one is not there yet; bytes are counted up to the total."""
    path = small_i2v / "high_noise.safetensors"
    whole = load_transformer(path)
    seen: list[torch.nn.Module] = []
    counted: list[tuple[int, int]] = []

    def each(block: torch.nn.Module) -> None:
        assert all(not weight.is_meta for weight in block.parameters())
        seen.append(block)

    net = load_transformer(path, report=lambda *count: counted.append(count), each_block=each)
    assert seen == list(net.blocks)
    assert counted[-1][0] == counted[-1][1] == path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    assert [done for done, _ in counted] == sorted(done for done, _ in counted)
    for (key, value), expected in zip(net.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key


def test_on_a_cpu_weights_stay_in_their_file(tmp_path: Path) -> None:
    layer = torch.nn.Linear(64, 32)
    write_tensors(tmp_path / "weights.safetensors", layer.state_dict())
    state = read_tensors(tmp_path / "weights.safetensors")
    net = torch.nn.Linear(64, 32, device="meta")
    assign(net, state, "cpu", torch.float32)
    assert net.weight.data_ptr() == state["weight"].data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_on_a_gpu(tmp_path: Path, suffix: str) -> None:
    state = numbers()
    write_tensors(tmp_path / f"weights{suffix}", state)
    read = read_tensors(tmp_path / f"weights{suffix}")
    to = {"large": torch.bfloat16, "half": torch.float16}
    items = {key: Item(value, to.get(key, value.dtype)) for key, value in read.items()}
    groups = [{key: item for key, item in items.items() if (key in to) == converted} for converted in (True, False)]
    for placed in transfer(groups, torch.device("cuda")):
        for key, value in placed.items():
            assert value.is_cuda
            assert torch.equal(bits(value.cpu()), bits(state[key].to(to.get(key, state[key].dtype)))), key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_at_size(tmp_path: Path, monkeypatch) -> None:
    """With the true pool, beside work on the current stream, in two threads at once; block by block no more memory."""
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.undo()
    states = [{f"{i}": torch.randn(1 << 24) for i in range(8)} for _ in range(2)]
    paths = [tmp_path / f"{n}.safetensors" for n in range(2)]
    for path, state in zip(paths, states, strict=True):
        write_tensors(path, state)

    def load(n: int) -> list[Tensor]:
        groups = [{k: Item(v, torch.bfloat16)} for k, v in read_tensors(paths[n]).items()]
        return [placed for group in transfer(groups, torch.device("cuda")) for placed in group.values()]

    a = torch.randn(4096, 4096, device="cuda")
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(load, n) for n in range(2)]
        for _ in range(50):
            a = a @ a / 64
        results = [future.result() for future in futures]
    for n, result in enumerate(results):
        for key, value in zip(read_tensors(paths[n]), result, strict=True):
            assert torch.equal(value.cpu(), states[n][key].bfloat16())
    del results, result, value
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    items = [{k: Item(v, torch.float32)} for k, v in read_tensors(paths[0]).items()]
    for group in transfer(items, torch.device("cuda")):
        group.clear()
    assert torch.cuda.max_memory_allocated() - before <= states[0]["0"].nbytes
