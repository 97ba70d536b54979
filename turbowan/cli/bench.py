"""`turbowan bench`: measurements with random weights of true sizes, one JSON line a case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Measure with random weights of true sizes; one JSON line per case.")


@app.command()
def pipeline(
    preset: Annotated[str, typer.Option(help="1.3B-480p, 14B-720p, A14B-I2V-720p, tiny or tiny-I2V.")] = "1.3B-480p",
    folder: Annotated[Path, typer.Option(help="Where the weights are written, or were before.")] = Path("out/bench"),
    weights: Annotated[
        str | None, typer.Option("--format", help="Of the transformers' files: bf16, int8_block, int8_row or fp8.")
    ] = None,
    text_encoder: Annotated[str, typer.Option(help="Its file: bf16 (11.4 GB at true size) or fp8 (5.8).")] = "bf16",
    layers: Annotated[int | None, typer.Option(help="Fewer than the true number, for a trial.")] = None,
    requests: Annotated[int, typer.Option(help="Warm runs after the first of a process.")] = 3,
    first_ever: Annotated[
        bool | None, typer.Option("--first-ever/--no-first-ever", help="Also without compiled kernels; if on a GPU.")
    ] = None,
    write_only: Annotated[bool, typer.Option("--write-only", help="The files, no runs.")] = False,
    memory: Annotated[str | None, typer.Option(help="auto, speed, balanced or minimal.")] = None,
    gpu_budget: Annotated[str | None, typer.Option(help="Such as 12GB.")] = None,
    cap: Annotated[str | None, typer.Option(help="GPU memory that PyTorch is held to, as on a smaller card.")] = None,
    precision: Annotated[str | None, typer.Option(help="As of generate.")] = None,
    attention: Annotated[str, typer.Option(help="original, sla or sagesla.")] = "sla",
    resolution: Annotated[str | None, typer.Option(help="Instead of the preset's.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, with a height.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, with a width.")] = None,
    num_frames: Annotated[int, typer.Option(help="4k+1.")] = 81,
    num_steps: Annotated[int | None, typer.Option(help="Of the sampler; 4 if not given.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """From a prompt to a file at true sizes: seconds by stage and peak memory, cold and warm."""
    from ..bench import presets
    from ..bench.pipeline import Trial, run_pipeline
    from ..engine import choose_device
    from ..request import GenerateRequest, parse_bytes
    from ..terminal import ProgressLine

    chosen = presets.find_preset(preset, weights, text_encoder)
    given = {
        "memory": memory, "gpu_budget": gpu_budget, "precision": precision, "width": width, "height": height,
        "num_steps": num_steps, "resolution": resolution or (None if width else chosen.resolution),
    }  # fmt: skip
    request: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    request |= {"prompt": presets.PROMPT, "num_frames": num_frames, "attention": attention}
    size = presets.frame_size(GenerateRequest(**request))
    limit = None if cap is None else parse_bytes(cap)
    where = choose_device(device)
    manifest, home = presets.write_model(folder, chosen, text_encoder, layers, where, ProgressLine())
    facts = {"preset": preset, "text_encoder": text_encoder, "layers": layers, "tokenizer": presets.TOKENIZER_NOTE}
    trial = Trial(
        manifest, home, request, str(where), size if chosen.experts else None, requests,
        where.type == "cuda" if first_ever is None else first_ever, limit, facts | {"cap": cap},
    )  # fmt: skip
    for record in () if write_only else run_pipeline(trial):
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
def text(
    weights: Annotated[str, typer.Option("--format", help="Of the weights: bf16 or fp8.")] = "bf16",
    tokens: Annotated[list[int] | None, typer.Option(help="Length of the prompt; 60 and 512 if not given.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed calls.")] = 10,
    graph: Annotated[bool, typer.Option("--graph", help="Time the call as a CUDA graph too.")] = False,
) -> None:
    """The text encoder on a GPU, umT5-xxl with random weights: median, rate, work of the host."""
    from ..bench.text import run_text

    for record in run_text(weights, tokens or (60, 512), repeats, graph):
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
