"""ComfyUI's page in a headless Chromium, driven through Playwright."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright
from real_server import Refused, Server

FLAGS = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
SIZE = {"width": 1600, "height": 900}
NODES = """() => app.graph._nodes.map((node) => ({
    id: node.id, type: node.type, title: node.title, red: Boolean(node.has_errors),
    known: node.type in LiteGraph.registered_node_types,
    widgets: Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, widget.value])),
}))"""


class Page:
    """The page of a server, until the end of the `with`.

    Args:
        browser: Chromium's binary. scale: screenshots' pixels to one of the page.
    """

    def __init__(self, server: Server, browser: Path, scale: float = 1.0) -> None:
        self.server, self.browser, self.scale = server, browser, scale
        self.errors: list[str] = []

    def __enter__(self) -> Page:
        self.server.post("/settings/Comfy.TutorialCompleted", True)  # else templates open over everything
        self.server.post("/settings/Comfy.Minimap.Visible", False)
        self._playwright = sync_playwright().start()
        self._chromium = self._playwright.chromium.launch(executable_path=str(self.browser), args=FLAGS)
        self.page = self._chromium.new_page(viewport=SIZE, device_scale_factor=self.scale)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(self.server.url)
        self.page.wait_for_function(
            "() => window.app?.graph && window.LiteGraph?.registered_node_types?.TurboWanModelLoader", timeout=60_000
        )
        self.page.wait_for_timeout(1000)
        return self

    def __exit__(self, *_: object) -> None:
        self._chromium.close()
        self._playwright.stop()

    def load(self, graph: dict, name: str | None = None) -> dict[int, dict[str, Any]]:
        """Open a graph as the editor saves it; its nodes by number. Fails where one is red or unknown."""
        self.page.evaluate("([graph, name]) => app.loadGraphData(graph, true, true, name)", [graph, name])
        return self.nodes()

    def load_api(self, prompt: dict, name: str) -> dict[int, dict[str, Any]]:
        """Open a graph in the API's form; the page lays it out."""
        self.page.evaluate("([prompt, name]) => app.loadApiJson(prompt, name)", [prompt, name])
        return self.nodes()

    def nodes(self) -> dict[int, dict[str, Any]]:
        found = self.page.evaluate(NODES)
        bad = [f"{node['id']} {node['type']}" for node in found if node["red"] or not node["known"]]
        assert not bad, f"red in the page: {bad}"
        return {node["id"]: node for node in found}

    def prompt(self) -> dict[str, dict]:
        """The open graph in the API's form."""
        return self._handed("output")

    def graph(self) -> dict:
        """The open graph as a user would save it."""
        return self._handed("workflow")

    def _handed(self, key: str) -> dict:
        # as text, as the page itself hands it on: what is undefined is left out
        text = self.page.evaluate("async (key) => JSON.stringify((await app.graphToPrompt())[key])", key)
        return dict(json.loads(text))

    def set(self, number: int, **values: object) -> None:
        """Set widgets of a node by name."""
        self.page.evaluate(
            "([id, values]) => { for (const widget of app.graph.getNodeById(id).widgets)"
            " if (widget.name in values) widget.value = values[widget.name]; }",
            [number, values],
        )

    def notices(self) -> str:
        """What the page's notices say just now."""
        return " ".join(self.page.locator(".p-toast-message").all_inner_texts())

    def dismiss(self) -> None:
        """Close all notices."""
        self.page.evaluate("() => app.extensionManager.toast.removeAll()")
        self.page.wait_for_function("() => !document.querySelector('.p-toast-message')")

    def run(self, timeout: float = 900) -> tuple[float, dict[str, Any]]:
        """Press Run; seconds and outputs by node."""
        before, started = self._known(), time.monotonic()
        self.page.evaluate("() => app.queuePrompt(0, 1)")
        errors = self.page.evaluate("() => app.lastNodeErrors")
        if errors:
            raise Refused(json.dumps(errors))
        (number,) = self._known() - before
        outputs = self.server.wait(number, timeout)
        return time.monotonic() - started, outputs

    def _known(self) -> set[str]:
        """The prompts that the server has had or has."""
        queue = self.server.get("/queue")
        return set(self.server.get("/history")) | {each[1] for each in queue["queue_running"] + queue["queue_pending"]}
