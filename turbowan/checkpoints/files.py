"""Reading and writing tensor files: `.safetensors`, `.pth`, sharded sets. No pickled code ever runs."""

from __future__ import annotations

import json
import os
import pickle
import struct
import warnings
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError

State = dict[str, Tensor]

SAFETENSORS = (".safetensors", ".sft")
PICKLED = (".pth", ".pt", ".ckpt", ".bin")
_SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
WRITERS = 8  # tensors that are written at a time
_POSITION = Lock()
_FORMATS = "_quantization_metadata"  # where ComfyUI may state its layers' formats instead of in `comfy_quant` tensors
_NESTED = ("state_dict", "model", "module")  # where training tools put the tensors inside a .pth


def read_tensors(path: Path) -> State:
    """All tensors of a file, a sharded set's index, or a folder that holds one of these; memory-mapped on the CPU.

    Raises:
        CheckpointError: missing, empty, truncated, of another format, or holding more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; check the path or run 'turbowan download'")
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes); download it again")
    if path.suffix == ".json":
        return _read_sharded(path)
    if path.suffix in SAFETENSORS:
        return _read_safetensors(path, size)
    if path.suffix in PICKLED:
        return _read_pickled(path, size)
    known = " ".join(SAFETENSORS + PICKLED)
    raise CheckpointError(f"{path} ends in '{path.suffix}'; weights end in one of {known}")


def weight_files(folder: Path) -> list[Path]:
    """The shard indices in a folder, or where there are none its weight files."""
    single = (path for path in folder.iterdir() if path.suffix in SAFETENSORS + PICKLED)
    return sorted(folder.glob("*.index.json")) or sorted(single)


def _weights_in(folder: Path) -> Path:
    """The one set of weights in a folder, an index before single files."""
    found = weight_files(folder)
    if len(found) != 1:
        names = ", ".join(p.name for p in found[:4]) or "none"
        raise CheckpointError(f"{folder} holds {len(found)} weight files ({names}); name one of them")
    return found[0]


def _read_safetensors(path: Path, size: int) -> State:
    try:
        with safe_open(str(path), framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            formats = json.loads((file.metadata() or {}).get(_FORMATS, "{}")).get("layers", {})
        for layer, facts in formats.items():
            state.setdefault(f"{layer}.comfy_quant", torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8))
        return state
    except Exception as error:  # what a damaged header raises is not written down
        raise CheckpointError(
            f"{path} ({size:,} bytes) is not a readable .safetensors file ({_one_line(error)}); download it again"
        ) from error


def _read_pickled(path: Path, size: int) -> State:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickles, just before it fails on them
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} ({size:,} bytes) holds pickled objects other than tensors, or is damaged;"
            f" only plain tensor files are read, never code ({_one_line(error)})"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path} ({size:,} bytes) is not a readable PyTorch file ({_one_line(error)}); download it again"
        ) from error
    for key in _NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a mapping of names to tensors")
    tensors = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors (keys: {', '.join(map(str, list(loaded)[:4])) or 'none'})")
    return tensors


def _read_sharded(index: Path) -> State:
    try:
        shards = {str(key): str(name) for key, name in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a shard index with a 'weight_map' ({_one_line(error)})") from error
    state: State = {}
    names = sorted(set(shards.values()))
    for name in names:
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {len(names)} shards, of which {name} is missing; download it too")
        state.update(read_tensors(index.parent / name))
    missing = sorted(set(shards) - set(state))
    if missing:
        raise CheckpointError(f"{index} lists {len(missing)} tensors its shards lack, e.g. {missing[0]}")
    return state


def write_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `.safetensors` or `.pth`, by the suffix, beside the target first and renamed when whole.

    Raises:
        CheckpointError: unknown suffix, or the place cannot be written.
    """
    with replacing(path) as partial:
        if path.suffix in SAFETENSORS:
            _write_safetensors(partial, state, state.items(), metadata or {})
        elif path.suffix in PICKLED:
            _write_pickled(partial, state)
        else:
            raise CheckpointError(f"cannot write {path}: weights end in one of {' '.join(SAFETENSORS + PICKLED)}")


def stream_tensors(path: Path, layout: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """`write_tensors` of tensors that are made one after another: for `.safetensors`, few at a time are in memory.

    Args:
        layout: a tensor for each key, of which only shape and dtype count (the meta device will do).
        tensors: the same keys with their values, in any order. A `.pth` file needs all of them before it is written.

    Raises:
        CheckpointError: unknown suffix, or the place cannot be written.
    """
    if path.suffix in SAFETENSORS:
        with replacing(path) as partial:
            _write_safetensors(partial, layout, tensors, {})
        return
    state = {key: torch.empty_like(value, device="cpu") for key, value in layout.items()}
    for key, value in tensors:
        state[key].copy_(value)  # into memory taken before: what is freed between would not be given back
    write_tensors(path, state)


def check_output(source: Path, target: Path) -> None:
    """Raise CheckpointError unless weights made from one file can be written to another: before any work is done."""
    if target.suffix not in SAFETENSORS + PICKLED:
        raise CheckpointError(f"cannot write {target}: weights end in one of {' '.join(SAFETENSORS + PICKLED)}")
    if target.is_dir():
        raise CheckpointError(f"cannot write {target}: it is a folder")
    if source.resolve() == target.resolve():
        raise CheckpointError(f"{target} is the input itself; name another output")


def _write_safetensors(
    path: Path, layout: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """The format: header length (8 bytes), header (JSON, filled with spaces to 8 bytes), data without gaps.

    Our own because `safetensors` needs every tensor at once, copies those that share memory (all memory-mapped ones do)
    and makes files that only their owner may read.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}  # transformers refuses files without format
    offset = 0
    widest_first = sorted(layout.items(), key=lambda item: (-item[1].itemsize, item[0]))  # keeps all of them aligned
    for key, value in widest_first:
        if value.dtype not in _SAFETENSORS_NAMES:
            raise CheckpointError(f"{key} is {value.dtype}, which a .safetensors file cannot hold")
        end = offset + value.numel() * value.itemsize
        header[key] = {
            "dtype": _SAFETENSORS_NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(WRITERS) as pool:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(start + offset)
        under_way: deque[Future[None]] = deque()
        for key, value in tensors:
            if value.shape != layout[key].shape or value.dtype != layout[key].dtype:
                raise ValueError(f"{key} came as {value.dtype} {list(value.shape)}, not as in the layout")
            place = start + header[key]["data_offsets"][0]
            under_way.append(pool.submit(_write_at, file, _bytes(value).numpy().data, place))
            if len(under_way) >= WRITERS:
                under_way.popleft().result()
        for last in under_way:
            last.result()


def _write_at(file: FileIO, data: memoryview, offset: int) -> None:
    """All of the data: a system takes 2 GiB at a time at most, and less where it likes."""
    while len(data):
        if hasattr(os, "pwrite"):
            done = os.pwrite(file.fileno(), data, offset)
        else:  # Windows, where a file has one position
            with _POSITION:
                file.seek(offset)
                done = file.write(data)
        data, offset = data[done:], offset + done


def _write_pickled(path: Path, state: Mapping[str, Tensor]) -> None:
    try:
        torch.save({key: _alone(value) for key, value in state.items()}, path)
    except RuntimeError as error:
        raise OSError(_one_line(error)) from error


def _alone(value: Tensor) -> Tensor:
    """A tensor over the same memory whose storage is no larger: torch.save writes storages whole."""
    return _bytes(value).view(value.dtype).view(value.shape) if value.numel() else value.detach().clone()


def _bytes(value: Tensor) -> Tensor:
    """A tensor's bytes, uint8 [n], without a copy where it is contiguous and on the CPU."""
    flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return torch.from_numpy(flat.numpy())


def file_identity(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time of change of the weights at a path, in nanoseconds: what differs when they do.

    Args:
        path: a file, a shard index (all weights beside it count), or a folder of weights.
    """
    folder = path if path.is_dir() else path.parent
    one = path.is_file() and path.suffix != ".json"
    files = [path] if one else sorted(p for p in folder.iterdir() if p.suffix in (*SAFETENSORS, *PICKLED, ".json"))
    return tuple((str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files)


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it, unless they are there. Returns it.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"the folder {folder} cannot be made: {error.strerror or error}") from error
    return folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside the target to write to; it takes the target's place at the end, or is removed on any error."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
