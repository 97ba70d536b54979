"""`turbowan bench`: measurements with random weights of true sizes, one JSON line a case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure with random weights of true sizes; one JSON line per case.")


@app.callback()
def _commands() -> None:
    """Keeps `pipeline` a subcommand while it is the only one."""


@app.command()
def pipeline(
    size: Annotated[str, typer.Option(help="1.3B, 14B or tiny.")] = "1.3B",
    scratch: Annotated[Path, typer.Option(help="Where the weights are written, or were before.")] = Path("out/bench"),
    quantize: Annotated[bool, typer.Option("--quantize/--no-quantize", help="Official int8 blocks.")] = False,
    resolution: Annotated[str, typer.Option(help="A name of the resolution table.")] = "480p",
    num_frames: Annotated[int, typer.Option(help="4k+1.")] = 81,
    attention: Annotated[str, typer.Option(help="original, sla or sagesla.")] = "sla",
    repeats: Annotated[int, typer.Option(help="Warm runs after the first.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """From official files to decoded frames: seconds per stage and peak memory."""
    from ..bench.pipeline import run_pipeline
    from ..bench.random_weights import write_random_model
    from ..checkpoints.manifest import FILE_NAME
    from ..engine import EMBEDDED, choose_device
    from ..request import GenerateRequest

    folder = scratch / f"{size}{'-quant' if quantize else ''}"
    where = choose_device(device)
    if not (folder / FILE_NAME).exists():
        write_random_model(folder, size, EMBEDDED / "tiny" / "tokenizer" / "spiece.model", quantize, where)
    request = GenerateRequest(
        prompt="a red circle moves right on a blue background",
        resolution=resolution,
        num_frames=num_frames,
        attention=attention,
    )
    for record in run_pipeline(folder, request, str(where), repeats):
        print(json.dumps(record), flush=True)
