"""The graphs of example_workflows fit the nodes, in both forms. What they make is the affair of `run_examples.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from turbowan.comfy import NODE_CLASS_MAPPINGS

FOLDER = Path(__file__).parent.parent.parent / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def test_there_is_one_per_task() -> None:
    assert NAMES == ["image_to_video", "ksampler", "low_memory", "text_to_video"]


@pytest.mark.parametrize("name", NAMES)
def test_the_api_form_gives_our_nodes_what_they_declare(name: str) -> None:
    graph = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    assert any(node["class_type"] in NODE_CLASS_MAPPINGS for node in graph.values())
    for node in graph.values():
        if node["class_type"] not in NODE_CLASS_MAPPINGS:
            continue
        declared = NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
        inputs = {**declared["required"], **declared.get("optional", {})}
        assert set(declared["required"]) <= set(node["inputs"]) <= set(inputs)
        for key, value in node["inputs"].items():
            kind, options = inputs[key]
            if isinstance(value, list):
                assert graph[value[0]]["class_type"]
            elif isinstance(kind, list):
                assert value in kind, key
            elif kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"], key


@pytest.mark.parametrize("name", NAMES)
def test_the_editors_form_has_the_same_nodes_and_values(name: str) -> None:
    graph = json.loads((FOLDER / f"{name}.json").read_text())
    api = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    nodes = {str(node["id"]): node for node in graph["nodes"] if node["type"] != "MarkdownNote"}
    assert {key: node["type"] for key, node in nodes.items()} == {k: n["class_type"] for k, n in api.items()}
    for key, node in nodes.items():
        given = [value for value in api[key]["inputs"].values() if not isinstance(value, list)]
        extra = [value for value in node.get("widgets_values", []) if value not in given]
        assert set(map(str, extra)) <= {"fixed", "image"}  # widgets that only the page has
    starts = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    for key, node in nodes.items():
        linked = {each["name"]: starts[each["link"]] for each in node.get("inputs", []) if each.get("link")}
        assert linked == {k: v for k, v in api[key]["inputs"].items() if isinstance(v, list)}


@pytest.mark.parametrize("name", NAMES)
def test_the_preview_is_small(name: str) -> None:
    picture = FOLDER / f"{name}.jpg"
    assert picture.stat().st_size < 60_000
    with Image.open(picture) as opened:
        assert opened.size == (512, 320)
