"""The nodes' inputs against `contract.json`, written down from the graphs and code that were published before ours.

Where the published nodes contradict the models they drive, the table has what works and takes every old value:
frame counts step by 4 from 5 (published: by 8 from 9, which leaves out its own default 77), boundary by 0.001 (0.1),
sizes of TurboWanI2VPrepare by 16 from 64 (64 from 256, which leaves out its own default 720), width and height of
TurboDiffusionI2VSampler are optional. New inputs are optional and last; options are added at the end.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from turbowan.comfy import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

CONTRACT = json.loads((Path(__file__).parent / "contract.json").read_text())
REPOSITORY = Path(__file__).parent.parent.parent


def described(declared: tuple) -> dict[str, Any]:
    """An input as the table has it."""
    kind, options = declared
    found = {key: options[key] for key in ("default", "min", "max", "step") if key in options}
    combo = isinstance(kind, list)
    return {"type": "COMBO" if combo else kind, **found, **({"options": kind} if combo else {})}


@pytest.mark.parametrize("key", CONTRACT)
def test_a_node_has_the_inputs_of_the_table(key: str) -> None:
    node, wanted = NODE_CLASS_MAPPINGS[key], CONTRACT[key]
    declared = node.INPUT_TYPES()
    assert list(node.RETURN_TYPES) == wanted["outputs"]
    assert wanted["category"] == node.CATEGORY
    for section in ("required", "optional"):
        inputs = declared.get(section, {})
        assert list(inputs) == list(wanted[section])
        for name, expected in wanted[section].items():
            found = described(inputs[name])
            if expected.get("files"):
                assert "tiny" in " ".join(found.pop("options"))
            assert found == {k: v for k, v in expected.items() if k != "files"}, name
            assert inputs[name][1]["tooltip"]


@pytest.mark.parametrize("key", CONTRACT)
def test_a_node_says_what_it_does_and_its_python_defaults_are_the_widgets(key: str) -> None:
    node = NODE_CLASS_MAPPINGS[key]
    assert node.DESCRIPTION
    assert NODE_DISPLAY_NAME_MAPPINGS[key]
    declared = node.INPUT_TYPES()
    parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
    for name, (_, options) in declared.get("optional", {}).items():
        default = parameters[name].default
        from_environment = default is None and "default" in options
        assert from_environment or default == options.get("default"), (name, default)
    for name in declared["required"]:
        assert parameters[name].default is inspect.Parameter.empty
    assert set(parameters) - {"self"} == {name for section in declared.values() for name in section}


def test_no_key_is_missing_from_the_table() -> None:
    assert set(NODE_CLASS_MAPPINGS) == set(CONTRACT) == set(NODE_DISPLAY_NAME_MAPPINGS)


def test_every_node_stands_in_the_documentation() -> None:
    told = (REPOSITORY / "docs" / "comfyui.md").read_text()
    assert [key for key in NODE_CLASS_MAPPINGS if f"`{key}`" not in told] == []


def test_importing_the_nodes_loads_neither_torch_nor_comfyui_and_changes_no_path() -> None:
    code = (
        "import sys; before = list(sys.path); import turbowan.comfy as nodes;"
        "[node.INPUT_TYPES() for node in nodes.NODE_CLASS_MAPPINGS.values()];"
        "assert sys.path == before; print([name for name in ('torch', 'comfy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("variable", "value", "name", "expected"),
    [
        ("ATTENTION_TYPE", "sagesla", "attention_type", "sagesla"),
        ("ATTENTION_TYPE", "nonsense", "attention_type", "sla"),
        ("ENABLE_TURBO", "false", "attention_type", "original"),
        ("TURBO_STEPS", "2", "num_steps", 2),
        ("TURBO_STEPS", "seven", "num_steps", 4),
    ],
)
def test_the_environment_sets_defaults_and_never_breaks_a_list(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, name: str, expected: object
) -> None:
    monkeypatch.setenv(variable, value)
    key = "TurboWanVideoLoader" if name == "attention_type" else "TurboWanVideoSampler"
    assert NODE_CLASS_MAPPINGS[key].INPUT_TYPES()["optional"][name][1]["default"] == expected
