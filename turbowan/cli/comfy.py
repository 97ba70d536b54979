"""`turbowan comfy`: ComfyUI and this package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Nodes for ComfyUI.", no_args_is_help=True)

FOLDER = "turbowan"
MARK = "Written by `turbowan comfy install`"
CONTENT = f'''"""{MARK}: the nodes of the turbowan package that this Python has installed."""

from turbowan.comfy import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, WEB_DIRECTORY

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
'''


@app.callback()
def comfy() -> None:
    """Nodes for ComfyUI."""


@app.command()
def install(
    path: Annotated[Path, typer.Argument(help="ComfyUI's folder, or its custom_nodes folder.")],
) -> None:
    """Make the nodes of this package known to a ComfyUI, by a small folder in its custom_nodes.

    ComfyUI must run on the Python that this package is installed in. Start it anew afterwards.
    """
    target = thin_folder(path.expanduser())
    print(f"{target} written; ComfyUI must run on {sys.executable}, and be started anew")


def thin_folder(path: Path) -> Path:
    """Write the folder, or write it anew.

    Raises:
        RequestError: the path is no ComfyUI, or holds another turbowan, such as a clone, already.
        MachineError: it cannot be written.
    """
    from ..checkpoints.files import replacing
    from ..errors import MachineError, RequestError

    nodes = path if path.name == "custom_nodes" else path / "custom_nodes"
    if not nodes.is_dir():
        raise RequestError(f"{path} holds no folder custom_nodes; name the folder that ComfyUI's main.py is in")
    target = nodes / FOLDER / "__init__.py"
    if target.parent.exists() and not (target.exists() and MARK in target.read_text(encoding="utf-8")):
        raise RequestError(f"{target.parent} is there already and not from this command; move it away first")
    try:
        target.parent.mkdir(exist_ok=True)
        with replacing(target) as partial:
            partial.write_text(CONTENT, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{target.parent} cannot be written: {error.strerror}") from error
    return target.parent
