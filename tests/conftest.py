"""What the tests share: the recorded cases of the official code, fresh seeds, and how far two tensors are apart."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.parse import unquote, urlsplit

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels then run on the CPU

from safetensors import safe_open
from torch import Tensor

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
if side_by_side := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # processes of tests share the cores
    threads = max(1, CORES // side_by_side)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the processes that they start
    torch.set_num_threads(threads)

HERE = Path(__file__).parent
# the whole recordings beside the checkout, then the copies that travel with the tests (some hold fewer tensors)
GOLDEN_FOLDERS = (HERE.parent.parent / "shared" / "golden", HERE / "golden")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `make test`: one for every core up to four (each takes 1.5 GB); with a GPU none, since they would share it."""
    return 0 if torch.cuda.is_available() else min(4, CORES)


@pytest.fixture
def golden() -> Callable[[str], Path]:
    """The path of a recorded file: from the folder beside the checkout, else from `tests/golden`; skips without it."""

    def find(name: str) -> Path:
        for folder in GOLDEN_FOLDERS:
            if (folder / name).exists():
                return folder / name
        pytest.skip(f"the recorded case {name} is not here")

    return find


@pytest.fixture
def recorded(golden: Callable[[str], Path]) -> Callable[..., list[Tensor]]:
    """The named tensors of a recorded `.safetensors` file, in order; skips where the file does not hold them all."""

    def read(name: str, *keys: str) -> list[Tensor]:
        with safe_open(str(golden(name)), framework="pt") as file:
            missing = set(keys) - set(file.keys())
            if missing:
                pytest.skip(f"the copy of {name} here lacks {', '.join(sorted(missing))}")
            return [file.get_tensor(key) for key in keys]

    return read


@pytest.fixture
def kernels() -> torch.device:
    """Where Triton kernels run here: the GPU, else the CPU by Triton's interpreter; skips without Triton."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def fresh_seed() -> int:
    """Seeds torch anew for every test; a failure prints the seed, and TURBOWAN_TEST_SEED repeats it."""
    seed = int(os.environ.get("TURBOWAN_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"TURBOWAN_TEST_SEED={seed}")
    torch.manual_seed(seed)
    return seed


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """|ours - theirs| / |theirs| in the 2-norm, as a float."""

    def error(ours: Tensor, theirs: Tensor) -> float:
        assert ours.shape == theirs.shape, f"shapes differ: {tuple(ours.shape)} and {tuple(theirs.shape)}"
        ours, theirs = ours.double(), theirs.double()
        found = float((ours - theirs).norm() / theirs.norm())
        print(f"relative error {found:.2e}")  # `pytest -rP` shows it
        return found

    return error


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small tensors gain nothing from a second, and lose much where cores are shared


class LoopbackHub:
    """A model hub on this machine: listings with checksums, large files redirected to a second server, ranges.

    repos: repository -> path -> content. requests: (method, path, headers) of both servers, in order.
    cut: path -> after how many bytes each of the next answers ends. stall: path -> after how many nothing more comes.
    status: repository or path -> status and error code of the answer. served: path -> content sent in its place.
    """

    COMMIT = "0123456789abcdef0123456789abcdef01234567"
    LARGE = 1000  # bytes; from here on files are listed with a SHA-256 and served by the second server

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.cut: dict[str, deque[int]] = {}
        self.status: dict[str, tuple[int, str]] = {}
        self.served: dict[str, bytes] = {}
        self.stall: dict[str, int] = {}
        self._closing = Event()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler()) for _ in range(2)]
        self.url, self.store_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def gets(self, path: str) -> list[dict[str, str]]:
        """Headers of the requests for a file's content, of those that were answered with content."""
        store = len(self._content(path)) >= self.LARGE
        return [headers for method, where, headers in self.requests
                if method == "GET" and where.endswith(path) and where.startswith("/store/") == store]  # fmt: skip

    def _content(self, path: str) -> bytes:
        return next(files[path] for files in self.repos.values() if path in files)

    def _listing(self, repo: str) -> dict[str, object]:
        siblings = []
        for path, content in self.repos[repo].items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, object] = {"rfilename": path, "size": len(content), "blobId": blob}
            if len(content) >= self.LARGE:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {"_id": "0", "id": repo, "modelId": repo, "sha": self.COMMIT, "siblings": siblings}

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805 (`self` is the request's)
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                where = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, where, dict(self.headers)))
                if where.startswith("/api/models/"):
                    repo = where.removeprefix("/api/models/")
                    if repo not in hub.repos and repo not in hub.status:
                        return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
                    if repo in hub.status:
                        return self._refuse(repo)
                    return self._send(200, json.dumps(hub._listing(repo)).encode(), {})
                path = where.removeprefix("/store/")
                if path == where:
                    repo, _, rest = where.strip("/").partition("/resolve/")
                    revision, _, path = rest.partition("/")
                    if revision != hub.COMMIT or path not in hub.repos.get(repo, {}):
                        return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                    if path in hub.status:
                        return self._refuse(path)
                    if len(hub.repos[repo][path]) >= hub.LARGE:
                        return self._send(302, b"", {"Location": f"{hub.store_url}/store/{path}"})
                return self._send_file(path)

            def _refuse(self, key: str) -> None:
                status, code = hub.status[key]
                self._send(status, b"", {"X-Error-Code": code})

            def _send_file(self, path: str) -> None:
                content = hub.served.get(path) or hub._content(path)
                start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") :].split("-")[0])
                headers = {"Accept-Ranges": "bytes"}
                if "Range" in self.headers:
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                cuts = hub.cut.get(path)
                if path in hub.stall:
                    self._send(200, content, headers, hub.stall[path])
                    hub._closing.wait(60)
                    return
                after = cuts.popleft() if cuts else -1
                self._send(206 if "Range" in self.headers else 200, content[start:], headers, after)

            def _send(self, status: int, body: bytes, headers: dict[str, str], cut_after: int = -1) -> None:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                with suppress(ConnectionError):  # the other side may stop first
                    self.wfile.write(body if cut_after < 0 else body[:cut_after])
                self.close_connection = cut_after >= 0

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def loopback_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A hub that HF_ENDPOINT points to; its files are what the test puts into `repos`. No token, 64 kB at a time."""
    hub = LoopbackHub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    hub.close()


@pytest.fixture(scope="session")
def small_t2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the embedded weights: 5 frames of 64x48 in 2 guided steps of UniPC, dense attention."""
    from turbowan.checkpoints.manifest import read_manifest, write_manifest
    from turbowan.engine import EMBEDDED

    folder = tmp_path_factory.mktemp("small-t2v")
    manifest = read_manifest(EMBEDDED / "tiny")
    how = {"sampler": "unipc", "num_steps": 2, "guidance_scale": 2.0, "attention": "original", "distilled": False}
    write_manifest(replace(manifest, name="small-t2v", width=64, height=48, num_frames=5, **how), folder)
    return folder


@pytest.fixture(scope="session")
def small_i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image-to-video folder of the same size: two experts of random weights with SLA, 3 steps of rcm."""
    from turbowan.checkpoints.files import write_tensors
    from turbowan.checkpoints.manifest import read_manifest, write_manifest
    from turbowan.checkpoints.official import write_transformer
    from turbowan.engine import EMBEDDED
    from turbowan.models.transformer import TransformerConfig, WanTransformer

    folder = tmp_path_factory.mktemp("small-i2v")
    manifest = read_manifest(EMBEDDED / "tiny")
    files = {role: path for role, path in manifest.files.items() if role != "transformer"}
    for role in ("high_noise", "low_noise"):
        net = WanTransformer(TransformerConfig(256, 512, 2, text_dim=128, in_dim=36, has_sla=True))
        files[role] = folder / f"{role}.safetensors"
        write_tensors(files[role], write_transformer(net.state_dict()))
    how = {"sampler": "rcm", "num_steps": 3, "guidance_scale": 1.0, "attention": "sla", "sla_topk": 0.5}
    size = {"width": 64, "height": 48, "num_frames": 5}
    small = replace(manifest, name="small-i2v", family="wan2.2-i2v", files=files, distilled=True, **how, **size)
    write_manifest(small, folder)
    return folder
