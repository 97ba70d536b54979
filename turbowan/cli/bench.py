"""`turbowan bench`: measurements with random weights of true sizes, as a table or one JSON line a case."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Measure with random weights of true sizes; a table, or with --json a line per case.")

AsJson = Annotated[bool, typer.Option("--json", help="One JSON line per case, with spread and machine, and no table.")]
# what a table's title, the names of cases, or only the JSON lines say
_NOT_SHOWN = {
    "bench", "gpu", "torch", "commit", "shape", "size", "precision", "attention", "bound_ms", "weights_gib",
    "preset", "text_encoder", "layers", "tokenizer", "cap", "num_steps", "linears", "gpu_source",
    "file_mb", "runs", "marks_s", "host_own_gib", "host_pinned_gib", "read_s", "memory", "gpu_budget",
}  # fmt: skip
_HEADINGS = {"ms p50": "ms", "share_of_bound": "of bound", "tflops": "TFLOP/s", "gbytes_per_s": "GB/s"}


@app.command()
def pipeline(
    preset: Annotated[str, typer.Option(help="1.3B-480p, 14B-720p, A14B-I2V-720p, tiny or tiny-I2V.")] = "1.3B-480p",
    folder: Annotated[Path, typer.Option(help="Where the weights are written, or were before.")] = Path("out/bench"),
    weights: Annotated[
        str | None, typer.Option("--format", help="Of the transformers' files: bf16, int8_block, int8_row or fp8.")
    ] = None,
    text_encoder: Annotated[str, typer.Option(help="Its file: bf16 (11.4 GB at true size) or fp8 (6.7).")] = "bf16",
    layers: Annotated[int | None, typer.Option(help="Fewer than the true number, for a trial.")] = None,
    requests: Annotated[int, typer.Option(min=0, help="Warm runs after the first of a process.")] = 3,
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
    as_json: AsJson = False,
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
    if not write_only:
        _show(run_pipeline(trial), as_json)


@app.command()
def op(
    what: Annotated[str, typer.Argument(help="attention, linear, norm or rope.")],
    shape: Annotated[str, typer.Option(help="1.3B-480p, 14B-480p or 14B-720p.")] = "1.3B-480p",
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 20,
    as_json: AsJson = False,
) -> None:
    """One operation on a GPU, every implementation: median, rate and share of what bounds it."""
    from ..bench.op import run_operation

    _show(run_operation(what, shape, repeats), as_json)


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
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 10,
    graph: Annotated[bool, typer.Option("--graph", help="Time the step as a CUDA graph too.")] = False,
    as_json: AsJson = False,
) -> None:
    """A step of the denoise time on a GPU: median, share of what the products alone would take, work of the host."""
    from ..bench.step import Step, growth
    from ..bench.transformer import run_transformer

    steps = growth(Step(resolution, num_frames, top_k), vary or [])
    _show(run_transformer(size, steps, precision, attention, text_rows, repeats, graph), as_json)


@app.command()
def text(
    weights: Annotated[str, typer.Option("--format", help="Of the weights: bf16 or fp8.")] = "bf16",
    tokens: Annotated[list[int] | None, typer.Option(help="Length of the prompt; 60 and 512 if not given.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 10,
    as_json: AsJson = False,
) -> None:
    """The text encoder on a GPU, umT5-xxl with random weights: median, rate, work of the host."""
    from ..bench.text import run_text

    _show(run_text(weights, tokens or (60, 512), repeats), as_json)


@app.command()
def vae(
    resolution: Annotated[str, typer.Option(help="480p or 720p.")] = "480p",
    num_frames: Annotated[int, typer.Option(help="4k+1.")] = 81,
    latents: Annotated[list[int] | None, typer.Option(help="Latent frames a chunk; 3 and 5 if not given.")] = None,
    tune: Annotated[bool | None, typer.Option(help="cuDNN's autotuning; both ways if not given.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs after two.")] = 3,
    modules: Annotated[bool, typer.Option("--modules/--no-modules", help="The plain modules too.")] = True,
    kernels: Annotated[bool, typer.Option("--kernels", help="Only kernels and convolutions, one by one.")] = False,
    as_json: AsJson = False,
) -> None:
    """Decoding and first-frame encoding on a GPU, whole and by kind of work, with random weights."""
    from ..bench.vae import run_kernels, run_vae

    tunes = (False, True) if tune is None else (tune,)
    whole = run_vae(resolution, num_frames, latents or (3, 5), tunes, repeats, modules)
    _show(run_kernels(resolution, repeats) if kernels else whole, as_json)


@app.command()
def compare(
    new: Annotated[list[Path], typer.Argument(help="Files of JSON lines (--json) just measured.")],
    against: Annotated[list[Path], typer.Option(help="Recorded ones: files or folders, as benchmarks/results/<gpu>.")],
    tolerance: Annotated[float, typer.Option(min=0, help="How much slower a case may be: 0.05 is 5 %.")] = 0.05,
    as_json: AsJson = False,
) -> None:
    """Medians against recorded ones; exit code 1 if any case is slower by more than the tolerance, or fails.

    Cases that are recorded but missing from what was run again are listed.
    """
    from ..bench.compare import compare as compare_records
    from .table import print_table

    rows, worse = compare_records(new, against, tolerance)
    if as_json:
        for row in rows:
            print(json.dumps(row))
    else:
        columns = ("bench", "case", "before_ms", "after_ms", "ratio", "verdict", "failed")
        cells = [[_cell(row.get(column)) for column in columns] for row in rows]
        missing = sum(row["verdict"] == "missing" for row in rows)
        title = f"{len(rows)} recorded cases: {worse} slower by more than {tolerance:.0%} or failed, {missing} missing"
        print_table(title, cells, ("bench", "case", "before ms", "after ms", "ratio", "", ""))
    raise typer.Exit(1 if worse else 0)


def _show(records: Iterable[Mapping[str, Any]], as_json: bool) -> None:
    """Lines as they come; or one table at the end, also of what was measured until an error or Ctrl-C."""
    if as_json:
        for record in records:
            print(json.dumps(record), flush=True)
        return
    found = []
    try:
        for record in records:
            found.append(record)
            if sys.stderr.isatty():
                print(f"\r\033[Kmeasured {len(found)}: {record['case']}", end="", file=sys.stderr, flush=True)
    finally:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if found:
            _print_records(found)


def _print_records(records: list[Mapping[str, Any]]) -> None:
    """A column for each number that is not nothing in all of them."""
    from .table import print_table

    rows = [dict(_numbers(record)) for record in records]
    names = dict.fromkeys(name for row in rows for name, value in row.items() if value)
    title = "{bench} on {gpu}, PyTorch {torch}".format_map(records[0])
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    print_table(title, cells, [_HEADINGS.get(name, name.replace("_", " ").replace("gib", "GiB")) for name in names])


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a table shows, by name: medians without their spread, and what is no deeper than that."""
    for name, value in record.items():
        if name in _NOT_SHOWN:
            continue
        if not isinstance(value, dict):
            yield name, value
            continue
        parts = {"p50": value["p50"]} if "p50" in value else value
        yield from ((f"{name} {part}", number) for part, number in parts.items() if not isinstance(number, dict))


def _cell(value: Any) -> str:
    return "" if value is None or value is False else str(value)
