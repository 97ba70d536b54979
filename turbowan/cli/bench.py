"""`turbowan bench`: measurements with random weights of true sizes, one JSON line a case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure with random weights of true sizes; one JSON line per case.")


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


@app.command()
def op(
    what: Annotated[str, typer.Argument(help="attention, linear, norm or rope.")],
    shape: Annotated[str, typer.Option(help="1.3B-480p, 14B-480p or 14B-720p.")] = "1.3B-480p",
    repeats: Annotated[int, typer.Option(help="Timed calls.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line per case; what is printed anyway.")] = True,
) -> None:
    """One operation on a GPU, every implementation: median, rate and share of what bounds it."""
    from ..bench.op import run_operation

    for record in run_operation(what, shape, repeats):
        print(json.dumps(record), flush=True)


@app.command()
def transformer(
    size: Annotated[str, typer.Option(help="1.3B, 14B or A14B-I2V.")] = "1.3B",
    resolution: Annotated[str, typer.Option(help="A name of the resolution table.")] = "480p",
    num_frames: Annotated[int, typer.Option(help="4k+1.")] = 81,
    top_k: Annotated[float, typer.Option(help="Share of key blocks kept.")] = 0.1,
    vary: Annotated[
        list[str] | None,
        typer.Option(help="tokens: five videos of 9,360 to 111,600. top-k: 0.05 to 0.5. Twice for both."),
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the linear layers: bf16, int8, fp8 or int8_block.")] = "int8",
    attention: Annotated[str, typer.Option(help="original, sla or sagesla.")] = "sla",
    text_rows: Annotated[int, typer.Option(help="Rows of text that keys are made of, of the 512 attended to.")] = 512,
    repeats: Annotated[int, typer.Option(help="Timed steps.")] = 10,
    graph: Annotated[bool, typer.Option("--graph", help="Time the step as a CUDA graph too.")] = False,
) -> None:
    """A step of the denoise time on a GPU: median, share of what the products alone would take, work of the host."""
    from ..bench.step import Step, growth
    from ..bench.transformer import run_transformer

    steps = growth(Step(resolution, num_frames, top_k), vary or [])
    for record in run_transformer(size, steps, precision, attention, text_rows, repeats, graph):
        print(json.dumps(record), flush=True)


@app.command()
def vae(
    resolution: Annotated[str, typer.Option(help="480p or 720p.")] = "480p",
    num_frames: Annotated[int, typer.Option(help="4k+1.")] = 81,
    latents: Annotated[list[int] | None, typer.Option(help="Latent frames a chunk; 3 and 5 if not given.")] = None,
    tune: Annotated[bool | None, typer.Option(help="cuDNN's autotuning; both ways if not given.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs after two.")] = 3,
    modules: Annotated[bool, typer.Option("--modules/--no-modules", help="The plain modules too.")] = True,
    kernels: Annotated[bool, typer.Option("--kernels", help="Only kernels and convolutions, one by one.")] = False,
) -> None:
    """Decoding and first-frame encoding on a GPU, whole and by kind of work, with random weights."""
    from ..bench.vae import run_kernels, run_vae

    tunes = (False, True) if tune is None else (tune,)
    whole = run_vae(resolution, num_frames, latents or (3, 5), tunes, repeats, modules)
    for record in run_kernels(resolution, repeats) if kernels else whole:
        print(json.dumps(record), flush=True)


@app.command()
def compare(
    new: Annotated[list[Path], typer.Argument(help="Files of JSON lines just measured.")],
    against: Annotated[list[Path], typer.Option(help="Recorded ones: files or folders, as benchmarks/results/<gpu>.")],
    tolerance: Annotated[float, typer.Option(help="How much slower a case may be: 0.05 is 5 %.")] = 0.05,
) -> None:
    """Medians against recorded ones; exit code 1 if any case is slower by more than the tolerance."""
    from ..bench.compare import compare as compare_records

    rows, slower = compare_records(new, against, tolerance)
    for row in rows:
        print(json.dumps(row))
    raise typer.Exit(1 if slower else 0)
