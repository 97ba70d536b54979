"""`turbowan comfy install` writes a folder that holds the nodes, and nothing else."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from turbowan.comfy import NODE_CLASS_MAPPINGS

CommandLine = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("named", [".", "custom_nodes"])
def test_the_folder_that_is_written_has_the_nodes(command_line: CommandLine, tmp_path: Path, named: str) -> None:
    (tmp_path / "custom_nodes").mkdir()
    for _ in range(2):  # a second time is an update
        code, out, _ = command_line("comfy", "install", tmp_path / named)
        assert code == 0
        assert "custom_nodes/turbowan" in out
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert files == ["custom_nodes/turbowan/__init__.py"]
    spec = importlib.util.spec_from_file_location("thin", tmp_path / files[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS is NODE_CLASS_MAPPINGS
    assert list(Path(module.WEB_DIRECTORY).glob("*.js"))  # for the page


def test_what_is_no_comfyui_or_is_taken_is_refused(command_line: CommandLine, tmp_path: Path) -> None:
    code, _, error = command_line("comfy", "install", tmp_path)
    assert code == 2
    assert "custom_nodes" in error
    clone = tmp_path / "custom_nodes" / "turbowan" / "__init__.py"
    clone.parent.mkdir(parents=True)
    clone.write_text("a clone")
    code, _, error = command_line("comfy", "install", tmp_path)
    assert code == 2
    assert "already" in error
    assert clone.read_text() == "a clone"
