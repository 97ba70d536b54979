"""Our nodes in ComfyUI's own page: `python tests/comfy/run_page.py FOLDER --browser CHROMIUM [-k WORD]`.

FOLDER is ComfyUI's; CHROMIUM a Chromium or Chrome, driven through the package playwright (pip install playwright).
Graphs that TurboDiffusion's first nodes were published with lie in a folder beside the checkout, or where --published
says. Each case prints one line; the exit status is 1 where one fails.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from real_cases import Cases, parser
from real_server import REPOSITORY, Server, python_of

sys.path.insert(0, str(REPOSITORY))

from real_files import (
    EXPERTS,
    TEXT_ENCODER,
    TINY,
    VAE,
    write_experts,
    write_small_umt5,
    write_sparse_umt5,
    write_whole_vae,
)
from real_seen import read_frames

CONTROL = "control_after_generate"
OURS = ("TurboWan", "TurboDiffusion")
cases = Cases()


def published(folder: Path) -> dict[str, dict]:
    found = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    assert found, f"{folder} holds no graphs"
    return found


def named(server: Server, node: dict) -> dict[str, Any]:
    """The values of a hand-written node by name: in the order its inputs are declared in, links left out."""
    info = server.get(f"/object_info/{node['type']}")[node["type"]]
    names = []
    for section in ("required", "optional"):
        for name, (kind, *_) in info["input"].get(section, {}).items():
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "BOOLEAN", "STRING"):
                names.append(name)
    return dict(zip(names, node.get("widgets_values", []), strict=False))


def shown(nodes: dict[int, dict], number: int) -> dict[str, Any]:
    return dict(nodes[number]["widgets"])


def lone(kind: str, values: list) -> dict:
    """A graph of one node, as the editor saves it."""
    node = {"id": 1, "type": kind, "pos": [0, 0], "size": [300, 300], "flags": {}, "order": 0, "mode": 0,
            "properties": {}, "widgets_values": values}  # fmt: skip
    return {"last_node_id": 1, "last_link_id": 0, "nodes": [node], "links": [], "version": 0.4}


@cases
def published_graphs_open(page: Any, folder: Path) -> str:
    """Every widget has the value it was published with; saved by the page and opened again, the graph is the same."""
    lines = []
    for name, graph in published(folder).items():
        page.dismiss()
        nodes = page.load(graph)
        for node in graph["nodes"]:
            if node["type"].startswith(OURS):
                wanted = named(page.server, node)
                got = {key: shown(nodes, node["id"])[key] for key in wanted}
                assert got == wanted, f"{name}: {node['type']} shows {got}, published {wanted}"
        asked = sum("bong_tangent" in node.get("widgets_values", []) for node in graph["nodes"])
        put = [node for node in nodes.values() if node["widgets"].get("scheduler") == "simple"]
        assert len(put) == asked, (name, put)
        assert ("bong_tangent" in page.notices()) == bool(asked), f"{name}: {page.notices()}"
        before = page.prompt()
        page.load(page.graph())
        assert page.prompt() == before, f"{name}: another graph after saving"
        page.server.take_back(page.server.submit(before))
        lines.append(f"{len(nodes)} nodes")
    return f"{len(lines)} graphs ({', '.join(lines)}) accepted by the server"


@cases
def graphs_that_users_saved_open(page: Any, folder: Path) -> str:
    """Every form a node's values were ever saved in, with random values: each goes where it belongs."""
    pick = random.Random()
    state = pick.getrandbits(32)
    pick.seed(state)
    size = [16 * pick.randint(4, 60), 16 * pick.randint(4, 60)]
    seed, ode, control = pick.getrandbits(40), pick.random() < 0.5, pick.choice(["randomize", "increment"])
    boundary, sigma = pick.randint(1, 9) / 10, float(pick.randint(10, 400))
    resolution = pick.choice(["512", "720p", "1080p", "custom"])
    sampler = [4 * pick.randint(2, 40) + 1, pick.randint(1, 4), resolution, "4:3", boundary, sigma, seed]
    dual = [pick.randint(1, 4), boundary, seed]
    text = ["a", "b", 4 * pick.randint(2, 40) + 1, pick.randint(1, 4), boundary, seed]
    files = [*EXPERTS, VAE, TEXT_ENCODER]
    attention = [pick.choice(["sla", "original"]), pick.randint(1, 99) / 100]
    first = {"num_frames": sampler[0], "resolution": resolution, "sigma_max": sigma, "seed": seed, "use_ode": ode}
    second = {"num_steps": dual[0], "boundary": boundary, "seed": seed, "use_ode": ode}
    third = {"num_frames": text[2], "seed": seed, "use_ode": ode, "sla_topk": attention[1], "width": 1280}
    third["attention_type"] = attention[0]
    sized = {"width": size[0], "height": size[1]}
    forms: list[tuple[str, list, dict[str, Any]]] = [
        ("TurboDiffusionI2VSampler", [*sampler, ode], first | {"width": 480, CONTROL: "fixed"}),
        ("TurboDiffusionI2VSampler", [*sampler, ode, *size], first | sized | {CONTROL: "fixed"}),
        ("TurboDiffusionI2VSampler", [*sampler, control, ode], first | {"width": 480, CONTROL: control}),
        ("TurboDiffusionI2VSampler", [*sampler, control, ode, *size], first | sized | {CONTROL: control}),
        ("TurboDiffusionI2VSampler", [*sampler, not ode, ode, *size], first | sized | {CONTROL: "fixed"}),
        ("TurboDiffusionI2VSampler", [*sampler, control, ode, *size, "step_fraction"],
         first | sized | {CONTROL: control, "boundary_mode": "step_fraction"}),
        ("TurboWanDualExpertSampler", [*dual, ode, sigma], second | {"sigma_max": sigma, CONTROL: "fixed"}),
        ("TurboWanDualExpertSampler", [*dual, control, ode, sigma], second | {"sigma_max": sigma, CONTROL: control}),
        ("TurboWanDualExpertSampler", [*dual, ode, sigma, 200.0], second | {"sigma_max": sigma, CONTROL: "fixed"}),
        ("TurboDiffusionI2V", [*files, *text, ode, *attention], third | {CONTROL: "fixed"}),
        ("TurboDiffusionI2V", [*files, *text, control, ode, *attention], third | {CONTROL: control}),
        ("TurboDiffusionI2V", [*files, *text, ode, *attention, 0.1], third | {CONTROL: "fixed"}),
        ("TurboWanModelLoader", [EXPERTS[0]], {"attention_type": "sla", "sla_topk": 0.1}),
        ("TurboWanModelLoader", [EXPERTS[0], *attention], {"sla_topk": attention[1], "offload_mode": "comfy_native"}),
    ]  # fmt: skip
    for kind, values, wanted in forms:
        nodes = page.load(lone(kind, values))
        got = {key: shown(nodes, 1)[key] for key in wanted}
        assert got == wanted, f"{kind} saved as {values} shows {got}, not {wanted} (random state {state})"
    return f"{len(forms)} forms of {len({kind for kind, *_ in forms})} nodes"


@cases
def examples_open(page: Any, folder: Path) -> str:
    """As the page reads them, the graphs as the editor saves them are those in the API's form beside them."""
    names = sorted(path.stem for path in (REPOSITORY / "example_workflows").glob("*.json"))
    assert names, "there are no examples"
    offered = [name for found in page.server.get("/workflow_templates").values() for name in found]
    assert set(names) <= set(offered), f"templates of the page: {offered}"
    for name in names:
        path = REPOSITORY / "example_workflows" / f"{name}.json"
        page.load(json.loads(path.read_text()), name)
        assert page.prompt() == json.loads((path.parent / "api" / path.name).read_text()), f"{name}: two graphs"
    return f"{', '.join(names)}; all among the page's templates"


@cases
def other_graphs_are_left_alone(page: Any, folder: Path) -> str:
    """A graph without a node of ours keeps what it asks for, known or not."""
    values = ["enable", 42, "fixed", 4, 1.0, "euler", "bong_tangent", 0, 2, "enable"]
    page.dismiss()
    nodes = page.load(lone("KSamplerAdvanced", values))
    assert shown(nodes, 1)["scheduler"] == "bong_tangent", nodes
    assert not page.notices(), page.notices()
    return "bong_tangent stays where no node is ours"


@cases
def published_graphs_run(page: Any, folder: Path) -> str:
    """To the end, from the page, with small files under the expected names. Sizes are set down where the true-size VAE
    decodes (a CPU takes half an hour for 121 frames of 480x480) or the frame is 1280x720; the rest is as published."""
    small = {"width": 64, "height": 64}
    plans: dict[str, tuple[str, int, dict[str, Any]]] = {
        "turbodiffusion_hybrid_workflow.wrapper.json": ("tiny text, whole VAE", 4, small | {"num_frames": 5}),
        "turbodiffusion_simple_workflow.wrapper.json": ("tiny text, tiny VAE", 2, small | {"num_frames": 9}),
        "turbowan_workflow.main.json": ("whole text, tiny VAE", 7, {}),
        "turbowan_workflow.15-nodes.json": ("whole text, whole VAE", 8, small | {"length": 5}),
        "turbowan_workflow.wrapper.json": ("whole text, whole VAE", 8, small | {"length": 5}),
    }
    server, lines = page.server, []
    graphs = published(folder)
    with tempfile.TemporaryDirectory(prefix="turbowan-files-") as made:
        whole = Path(made)
        write_whole_vae(whole)
        write_sparse_umt5(whole)
        (whole / "small").mkdir()
        write_small_umt5(whole / "small")
        for name, (files, number, changes) in plans.items():
            text_dim = 128 if files.startswith("tiny text") else 4096
            write_experts(server.models("diffusion_models"), text_dim)
            texts = whole / "small" if text_dim == 128 else whole
            put(texts / TEXT_ENCODER, server.models("text_encoders") / TEXT_ENCODER)
            put(whole / VAE if files.endswith("whole VAE") else TINY / "vae.safetensors", server.models("vae") / VAE)
            page.load(graphs[name])
            page.set(number, **changes)
            seconds, outputs = page.run()
            frames = 33 if not changes else changes.get("num_frames", changes.get("length"))
            pictures = next(o["images"] for o in outputs.values() if "animated" not in o)
            assert len(pictures) == frames, f"{name}: {len(pictures)} pictures, {frames} expected"
            for each in outputs.values():
                if "videos" in each:
                    video = read_frames(server.file(each["videos"][0]))
                    assert video.shape[0] == frames, f"{name}: {video.shape}"
                    assert video.std() > 1, f"{name}: one colour"
            lines.append(f"{name} {seconds:.0f} s ({files})")
            print(f"    {lines[-1]}", flush=True)
    return f"{len(lines)} graphs"


def put(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    target.symlink_to(source)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--browser", type=Path, help="Chromium's binary; by default the one on the path")
    beside = REPOSITORY.parent / "shared" / "published-workflows"
    options.add_argument("--published", type=Path, default=beside, help="a folder of published graphs")
    args = options.parse_args()
    browser = args.browser or next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    missing = [
        "no ComfyUI given; name its folder" if args.folder is None else "",
        "no Chromium found; name one with --browser" if browser is None else "",
        "playwright is not installed" if importlib.util.find_spec("playwright") is None else "",
        "" if args.published.is_dir() else f"no published graphs in {args.published}",
    ]
    if any(missing):
        print(f"SKIPPED: {'; '.join(filter(None, missing))}")
        return 0
    from real_page import Page

    with Server(args.folder, args.python or python_of(args.folder), args.flag) as server:
        write_experts(server.models("diffusion_models"), 128)
        write_small_umt5(server.models("text_encoders"))
        put(TINY / "vae.safetensors", server.models("vae") / VAE)
        Image.effect_noise((64, 48), 90).convert("RGB").save(server.base / "input" / "example.png")
        with Page(server, Path(browser)) as page:
            return 1 if cases.run(server, page, args.published, only=args.k) else 0


if __name__ == "__main__":
    sys.exit(main())
