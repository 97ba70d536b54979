"""`turbowan convert`: a checkpoint in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A file, shard index or folder of any family.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="A .safetensors or .pth file; for diffusers a folder, too.")
    ],
    to: Annotated[str, typer.Option(help="official (TurboDiffusion), wan (original), diffusers, comfy or turbowan.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="spiece.model to put inside a text encoder, for comfy and turbowan.")
    ] = None,
) -> None:
    """Rewrite a transformer, VAE or text encoder in another layout, bit by bit; prints the files written."""
    from ..checkpoints.convert import convert_checkpoint

    for path in convert_checkpoint(source, target, to, tokenizer):
        print(path)
