"""A real ComfyUI, started in a folder of its own and driven as any client would. Standard library only."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
FLAGS = ("--database-url", "sqlite:///:memory:", "--disable-api-nodes", "--preview-method", "latent2rgb")


class Refused(Exception):
    """The server did not take a prompt; the text is its whole answer."""


class Failed(Exception):
    """A node raised; the text is 'node class: error type: message'."""


class Interrupted(Exception):
    """The run was interrupted."""


def python_of(comfy: Path) -> Path:
    """The interpreter beside ComfyUI's folder, else this one."""
    beside = comfy.resolve().parent / "venv" / "bin" / "python"
    return beside if beside.exists() else Path(sys.executable)


def link_in_order(folder: Path, packs: Sequence[Path]) -> None:
    """Links to packs under names that the system lists in their order, which is the one ComfyUI imports them in."""
    for attempt in range(1000):
        links = [folder / f"{pack.name}-{attempt}" for pack in packs]
        for link, pack in zip(links, packs, strict=True):
            link.symlink_to(pack)
        listed = os.listdir(folder)
        if sorted(links, key=lambda link: listed.index(link.name)) == links:
            return
        for link in links:
            link.unlink()
    raise RuntimeError(f"no names found that {folder} lists in order")


class Server:
    """Starts ComfyUI with this repository as a custom node, and stops it at the end of the `with`.

    Args:
        comfy: ComfyUI's folder. python: the interpreter that has its packages. flags: further ones.
        installed: by `turbowan comfy install`, not as a clone. device: "cpu" or "cuda".
        packs: folders of custom nodes in the order in which ComfyUI is to import them; this repository by default.
    """

    def __init__(
        self,
        comfy: Path,
        python: Path,
        flags: Sequence[str] = (),
        installed: bool = False,
        device: str = "cpu",
        packs: Sequence[Path] = (REPOSITORY,),
    ) -> None:
        self.comfy, self.python, self.installed = comfy.resolve(), python, installed
        self.device, self.flags, self.packs = device, tuple(flags), packs
        self.base = Path(tempfile.mkdtemp(prefix="turbowan-comfy-"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> Server:
        nodes = self.base / "custom_nodes"
        for folder in (nodes, self.base / "input", self.base / "output"):
            folder.mkdir(parents=True)
        environment = os.environ.copy()
        if self.installed:
            environment["PYTHONPATH"] = str(REPOSITORY)
            install = [self.python, "-m", "turbowan", "comfy", "install", self.base]
            subprocess.run(list(map(str, install)), env=environment, check=True, stdout=subprocess.DEVNULL)
        else:
            link_in_order(nodes, self.packs)
        shutil.copy(HERE / "probe_nodes.py", nodes / "probe_nodes.py")
        self.log = self.base / "server.log"
        command = [self.python, "main.py", "--listen", "127.0.0.1", "--port", self.url.rpartition(":")[2]]
        command += ["--base-directory", self.base, *FLAGS, *(("--cpu",) if self.device == "cpu" else ()), *self.flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=self.comfy, stdout=log, stderr=log, env=environment
            )
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return self
            except OSError:
                time.sleep(0.3)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self.base, ignore_errors=True)

    def models(self, kind: str) -> Path:
        folder = self.base / "models" / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def get(self, path: str) -> Any:
        with self._opener.open(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict) -> Any:
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), kind)
        try:
            with self._opener.open(request, timeout=60) as answer:
                text = answer.read()
                return json.loads(text) if text else {}
        except urllib.error.HTTPError as error:
            raise Refused(error.read().decode()) from error

    def submit(self, graph: dict) -> str:
        answer = self.post("/prompt", {"prompt": graph})
        if answer.get("node_errors"):
            raise Refused(json.dumps(answer["node_errors"]))
        return str(answer["prompt_id"])

    def take_back(self, prompt_id: str, timeout: float = 120) -> None:
        """Out of the queue again, or interrupted where it has begun; back when it is gone."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            queue = self.get("/queue")
            if prompt_id in [each[1] for each in queue["queue_running"]]:
                self.post("/interrupt", {"prompt_id": prompt_id})
            elif prompt_id in [each[1] for each in queue["queue_pending"]]:
                self.post("/queue", {"delete": [prompt_id]})
            else:
                return
            time.sleep(0.2)
        raise TimeoutError(f"{prompt_id} still runs after {timeout:g} s")

    def wait(self, prompt_id: str, timeout: float = 600) -> dict[str, Any]:
        """The outputs of a prompt, by node."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            record = self.get(f"/history/{prompt_id}").get(prompt_id)
            if record is not None:
                break
            time.sleep(0.05)
        else:
            raise TimeoutError(f"no end after {timeout:g} s")
        for kind, details in record["status"]["messages"]:
            if kind == "execution_error":
                what = details["exception_message"].strip()
                raise Failed(f"{details['node_type']}: {details['exception_type']}: {what}")
            if kind == "execution_interrupted":
                raise Interrupted(prompt_id)
        assert record["status"]["status_str"] == "success", record["status"]
        return dict(record["outputs"])

    def run(self, graph: dict, timeout: float = 600) -> dict[str, Any]:
        return self.wait(self.submit(graph), timeout)

    def interrupted(self, graph: dict, after: float) -> float:
        """Seconds from an interrupt, so long after handing in, to the end."""
        prompt = self.submit(graph)
        time.sleep(after)
        asked = time.monotonic()
        self.post("/interrupt", {})
        try:
            self.wait(prompt)
        except Interrupted:
            return time.monotonic() - asked
        raise AssertionError("it ran to its end")

    def timed(self, graph: dict, timeout: float = 600) -> tuple[float, dict[str, Any]]:
        """Seconds from handing in to the end, and the outputs."""
        started = time.monotonic()
        outputs = self.run(graph, timeout)
        return time.monotonic() - started, outputs

    def file(self, entry: dict[str, str]) -> Path:
        """Where an output that a node shows lies; it must be inside the output folder, as `/view` would find it."""
        path = self.base / entry["type"] / entry["subfolder"] / entry["filename"]
        assert path.resolve().is_relative_to(self.base.resolve()), path
        assert path.exists(), path
        return path

    def leaks(self) -> list[str]:
        """What the log says of models that outlive their last patcher."""
        return [line for line in self.log.read_text().splitlines() if "leak" in line]

    def memory(self) -> int:
        """Bytes resident."""
        return self._status("VmRSS")

    def peak_memory(self) -> int:
        """The most bytes that were ever resident."""
        return self._status("VmHWM")

    def _status(self, key: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(key)))
