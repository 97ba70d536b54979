"""`turbowan download`: published models by name, ready to generate with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..checkpoints.hub import Item


def download(
    name: Annotated[str | None, typer.Argument(help="A name of --list, or a full repository name.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; checkpoints/NAME by default.")] = None,
    quant: Annotated[
        bool | None,
        typer.Option("--quant/--plain", help="int8 weights (default where published), or bfloat16 (GPUs over 40 GB)."),
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Show what can be downloaded.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show sizes only.")] = False,
) -> None:
    """Fetch a published model: sizes first, resumed where it stopped, checked by checksum.

    HF_TOKEN and HF_ENDPOINT work as for every program of the Hugging Face hub.
    """
    from ..checkpoints import hub
    from ..checkpoints.published import find_published
    from ..errors import RequestError

    if list_all:
        return _print_list()
    if name is None:
        raise RequestError("name a model; 'turbowan download --list' shows them")
    model, quant = find_published(name, quant)
    folder = hub.folder_for(model, quant) if out is None else out.expanduser()
    hub.check_folder(model, quant, folder)
    files = hub.list_files(model, quant)
    if dry_run:
        return _print_plan(hub.look(files, folder), folder)
    with hub.exclusive(folder):
        items = hub.look(files, folder)
        _print_plan(items, folder)
        hub.check_space(items, folder)
        hub.fetch(items)
        manifest = hub.write_model_manifest(model, quant, folder)
    if manifest is None:
        print(f"all here and checked: --tokenizer {folder / model.parts['tokenizer'].path}")
    else:
        image = " --image IMAGE" if "i2v" in model.name else ""
        print(f"all here and checked: turbowan generate --model {folder}{image} --prompt PROMPT")
    return None


def _print_list() -> None:
    from ..checkpoints.published import PUBLISHED
    from .table import print_table

    rows = [
        (model.name, model.about, "int8, bfloat16" if model.quant else "", model.repo)
        for model in PUBLISHED.values()
    ]  # fmt: skip
    print_table("Published models", rows, ("name", "makes", "variants", "from"))


def _print_plan(items: list[Item], folder: Path) -> None:
    from ..machine import free_disk, size_text
    from .table import print_table

    def state(item: Item) -> str:
        if item.whole:
            return "here"
        if item.copy is not None:
            return f"here, in {item.copy.parent.name}"
        return f"{size_text(item.missing)} to come" if item.have else "to come"

    rows = [(item.file.path, size_text(item.file.size), state(item), item.file.repo) for item in items]
    total, missing = sum(item.file.size for item in items), sum(item.missing for item in items)
    rows.append(("total", size_text(total), f"{size_text(missing)} to come", f"{size_text(free_disk(folder))} free"))
    print_table(f"{folder}", rows, ("file", "size", "state", "from"))
