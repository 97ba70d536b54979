"""`turbowan evaluate`: how much of a prompt is in the picture, side by side for models and ways of sampling."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..evaluate.seeds import PICTURE_SEED, SCENE_SEED

if TYPE_CHECKING:
    from ..evaluate.questions import Questions

app = typer.Typer(help="Judge models on prompts and clips they never saw, with plain image analysis.")

Cases = Annotated[
    list[str],
    typer.Option(
        "--case",
        help="MODEL or MODEL:key=value,... with steps, attention, sla_topk, precision, sampler, guidance_scale,"
        " sigma_max, shift, boundary, ode=true, exact=MODEL (for the latent error). Once for each case.",
    ),
]
Against = Annotated[
    str | None, typer.Option(help="The case the others are compared with, or 'world'; the first by default.")
]
Diversity = Annotated[int | None, typer.Option(help="Prompts of which four clips are made; 64 on a GPU, 4 on a CPU.")]
Errors = Annotated[
    int | None,
    typer.Option(help="Prompts whose latents are also made in float32, dense; 64 on a GPU, 4 on a CPU."),
]
Seed = Annotated[int, typer.Option(help="Prompt r starts from the noise of seed + r.")]
Shard = Annotated[str, typer.Option(help="i/n: the i-th of n parts of the prompts; `join` adds the reports up.")]
BatchSize = Annotated[int | None, typer.Option("--batch", help="Prompts generated together; 50 on a GPU, 4 on a CPU.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of report.json and the sheets.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as one line of JSON instead of a table.")]


@app.command()
def prompts(
    case: Cases = ["tiny"],  # noqa: B006 (typer reads the default)
    against: Against = None,
    count: Annotated[
        int | None, typer.Option("--prompts", help="Held-out prompts of shapes; 1,000 on a GPU, 32 on a CPU.")
    ] = None,
    camera_prompts: Annotated[int, typer.Option(help="Prompts of a moving camera besides.")] = 0,
    diversity: Diversity = None,
    errors: Errors = None,
    scene_seed: Annotated[int, typer.Option(help="Which prompts are drawn.")] = SCENE_SEED,
    seed: Seed = 0,
    shard: Shard = "1/1",
    batch: BatchSize = None,
    device: Device = "auto",
    out: Out = Path("out/evaluate"),
    as_json: AsJson = False,
) -> None:
    """Text-to-video: colour, shape, direction and background right; motion, diversity, latent error."""
    from ..engine import choose_device
    from ..evaluate.questions import CameraQuestions, ShapeQuestions

    on_gpu = choose_device(device).type == "cuda"
    questions: list[Questions] = [ShapeQuestions(count if count is not None else 1000 if on_gpu else 32, scene_seed)]
    if camera_prompts:
        questions.append(CameraQuestions(camera_prompts, scene_seed))
    _compare(questions, case, against, diversity, errors, seed, shard, batch, device, out, as_json)


@app.command()
def i2v(
    case: Cases = ["tiny-i2v"],  # noqa: B006
    against: Against = None,
    pictures: Annotated[
        int | None, typer.Option(help="Held-out pictures under a moving camera; 1,000 on a GPU, 12 on a CPU.")
    ] = None,
    shapes: Annotated[
        int | None, typer.Option(help="Held-out scenes of moving shapes; 1,000 on a GPU, 12 on a CPU.")
    ] = None,
    photos: Annotated[Path | None, typer.Option(help="A folder of photographs, each under every camera.")] = None,
    diversity: Diversity = None,
    errors: Errors = None,
    scene_seed: Annotated[
        int, typer.Option(help="Which pictures are drawn; training draws its own from other random numbers.")
    ] = PICTURE_SEED,
    seed: Seed = 0,
    shard: Shard = "1/1",
    batch: BatchSize = None,
    device: Device = "auto",
    out: Out = Path("out/evaluate"),
    as_json: AsJson = False,
) -> None:
    """Image-to-video: the first frame kept (PSNR, beside the VAE's own), motion right; the rest as for prompts."""
    from ..engine import choose_device
    from ..evaluate.questions import PhotoQuestions, PictureQuestions, ShapeQuestions

    usual = 1000 if choose_device(device).type == "cuda" else 12
    questions: list[Questions] = []
    if pictures != 0:
        questions.append(PictureQuestions(usual if pictures is None else pictures, scene_seed))
    if shapes != 0:
        questions.append(ShapeQuestions(usual if shapes is None else shapes, scene_seed, from_pictures=True))
    if photos is not None:
        questions.append(PhotoQuestions(photos, scene_seed))
    _compare(questions, case, against, diversity, errors, seed, shard, batch, device, out, as_json)


@app.command()
def vae(
    model: Annotated[str, typer.Option(help="A model made for the procedural world.")] = "tiny",
    clips: Annotated[int, typer.Option(help="Held-out clips of shapes, and as many of cameras.")] = 16,
    device: Device = "auto",
) -> None:
    """What the VAE alone keeps of clips it never saw: PSNR, and shapes still recognised, as one line of JSON."""
    from ..checkpoints import load_vae
    from ..engine import Engine
    from ..evaluate.reconstruction import evaluate_vae

    engine = Engine.load(model, device=device)
    manifest = engine.manifest
    net = load_vae(manifest.files["vae"], engine.device)
    size = (manifest.num_frames, manifest.height or 160, manifest.width or 256)
    report = {
        "model": manifest.name,
        "shapes": evaluate_vae(net, clips, *size, device=engine.device),
        "camera": evaluate_vae(net, clips, *size, device=engine.device, camera=True),
    }
    print(json.dumps(report))


@app.command()
def join(
    reports: Annotated[list[Path], typer.Argument(help="report.json of several runs.")],
    against: Against = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("out/evaluate/joined.json"),
    as_json: AsJson = False,
) -> None:
    """One report from several: of other shards, or of other cases over the same prompts."""
    from ..evaluate.report import join as join_reports
    from ..evaluate.report import read_report, write_report

    joined = join_reports([read_report(path) for path in reports], against)
    write_report(joined, out)
    _show(joined["parts"], as_json)


def _compare(
    questions: Sequence[Questions], cases: Sequence[str], against: str | None, diversity: int | None,
    errors: int | None, seed: int, shard: str, batch: int | None, device: str, out: Path, as_json: bool,
) -> None:  # fmt: skip
    from ..bench.pipeline import machine_facts
    from ..checkpoints.files import make_folder, replacing
    from ..engine import choose_device
    from ..errors import RequestError
    from ..evaluate.case import read_cases
    from ..evaluate.compare import WORLD, Extent, compare
    from ..evaluate.player import Players
    from ..evaluate.report import write_report
    from ..terminal import ProgressLine

    if not questions:
        raise RequestError("nothing is asked: give --pictures, --shapes or --photos")
    chosen, reference = read_cases(cases, against, also=(WORLD,))
    where = choose_device(device)
    on_gpu = where.type == "cuda"
    part = re.fullmatch(r"(\d+)/(\d+)", shard)
    if part is None:
        raise RequestError(f"--shard takes i/n, such as 1/4; got '{shard}'")
    few = 64 if on_gpu else 4
    extent = Extent(
        batch=batch if batch is not None else 50 if on_gpu else 4,
        seed=seed,
        shard=(int(part[1]), int(part[2])),
        diversity=few if diversity is None else diversity,
        errors=few if errors is None else errors,
    )
    make_folder(out)
    players = Players(device)
    report: dict[str, Any] = {"command": " ".join(["turbowan", *sys.argv[1:]]), **machine_facts(where), "parts": {}}
    for asked in questions:
        report["parts"][asked.what], sheet = compare(chosen, reference, asked, extent, players, ProgressLine())
        with replacing(out / f"{asked.what}.png") as partial:
            sheet.draw().save(partial, format="PNG")
        write_report(report, out / "report.json")  # what is done so far, whatever comes after
    _show(report["parts"], as_json)


def _show(parts: Mapping[str, Any], as_json: bool) -> None:
    from ..evaluate.summary import table
    from .table import print_table

    if as_json:
        print(json.dumps({what: part["summary"] for what, part in parts.items()}))
        return
    for what, part in parts.items():
        header, rows = table(part)
        print_table(f"{what}: {len(part['rows'])} prompts", rows, header)
