"""`turbowan generate`: from a prompt, or a file of prompts, to video files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..engine import Engine
    from ..request import GenerateRequest

_FILES, _SIZE, _SAMPLING, _MACHINE = "Model files", "Size and length", "Sampling", "Machine and precision"


def generate(
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What the video shows.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file: one line, one video.")] = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="First frame, for image-to-video models.")] = None,
    negative_prompt: Annotated[str, typer.Option(help="What it should not show (models with guidance).")] = "",
    out: Annotated[Path, typer.Option("--out", "-o", help=".mp4, .webm, .gif or .png.")] = Path("out/video.mp4"),
    preview: Annotated[
        bool, typer.Option("--preview", help="Show what is coming: OUT.preview.gif at each step, and in the terminal.")
    ] = False,
    print_json: Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON per video.")] = False,
    model: Annotated[
        str | None, typer.Option(help="tiny, tiny-i2v, tiny-base, a folder or a manifest.", rich_help_panel=_FILES)
    ] = None,
    transformer: Annotated[Path | None, typer.Option(help="The transformer's file.", rich_help_panel=_FILES)] = None,
    high_noise: Annotated[Path | None, typer.Option(help="High-noise expert.", rich_help_panel=_FILES)] = None,
    low_noise: Annotated[Path | None, typer.Option(help="Low-noise expert.", rich_help_panel=_FILES)] = None,
    vae: Annotated[Path | None, typer.Option(help="VAE.", rich_help_panel=_FILES)] = None,
    text_encoder: Annotated[Path | None, typer.Option(help="Text encoder (umT5).", rich_help_panel=_FILES)] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="spiece.model or its folder.", rich_help_panel=_FILES)] = None,
    image_encoder: Annotated[Path | None, typer.Option(help="CLIP (Wan 2.1 I2V).", rich_help_panel=_FILES)] = None,
    resolution: Annotated[str | None, typer.Option(help="480p, 720p, 1080p …", rich_help_panel=_SIZE)] = None,
    aspect_ratio: Annotated[str, typer.Option(help="16:9, 9:16, 4:3, 3:4 or 1:1.", rich_help_panel=_SIZE)] = "16:9",
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.", rich_help_panel=_SIZE)] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.", rich_help_panel=_SIZE)] = None,
    adaptive_resolution: Annotated[
        bool, typer.Option("--adaptive-resolution", help="The image's own aspect ratio.", rich_help_panel=_SIZE)
    ] = False,
    num_frames: Annotated[int | None, typer.Option(help="4k+1.", rich_help_panel=_SIZE)] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file.", rich_help_panel=_SIZE)] = None,
    num_samples: Annotated[int, typer.Option(help="Videos per prompt.", rich_help_panel=_SIZE)] = 1,
    num_steps: Annotated[int | None, typer.Option(help="Steps of the sampler.", rich_help_panel=_SAMPLING)] = None,
    sampler: Annotated[str | None, typer.Option(help="rcm, euler or unipc.", rich_help_panel=_SAMPLING)] = None,
    ode: Annotated[bool, typer.Option("--ode", help="Deterministic rcm.", rich_help_panel=_SAMPLING)] = False,
    sigma_max: Annotated[float | None, typer.Option(help="First noise of rcm.", rich_help_panel=_SAMPLING)] = None,
    boundary: Annotated[float | None, typer.Option(help="Experts switch here.", rich_help_panel=_SAMPLING)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1: no guidance.", rich_help_panel=_SAMPLING)] = None,
    shift: Annotated[float | None, typer.Option(help="Of euler and unipc.", rich_help_panel=_SAMPLING)] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same video.", rich_help_panel=_SAMPLING)] = 0,
    noise_device: Annotated[str, typer.Option(help="cpu or cuda.", rich_help_panel=_SAMPLING)] = "cpu",
    attention: Annotated[str, typer.Option(help="auto, original, sla, sagesla.", rich_help_panel=_MACHINE)] = "auto",
    sla_topk: Annotated[float | None, typer.Option(help="Share of key blocks kept.", rich_help_panel=_MACHINE)] = None,
    precision: Annotated[
        str, typer.Option(help="auto, float32, bf16, int8, fp8 or int8_block.", rich_help_panel=_MACHINE)
    ] = "auto",
    norms: Annotated[str, typer.Option(help="exact or official.", rich_help_panel=_MACHINE)] = "exact",
    memory: Annotated[str, typer.Option(help="auto, speed, balanced, minimal.", rich_help_panel=_MACHINE)] = "auto",
    gpu_budget: Annotated[str | None, typer.Option(help="Such as 12GB.", rich_help_panel=_MACHINE)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_MACHINE)] = "auto",
    explain: Annotated[
        bool, typer.Option("--explain", help="Only show where everything would go in memory.", rich_help_panel=_MACHINE)
    ] = False,
) -> None:
    """Make a video from a prompt (and an image). What is left open comes from the model's manifest."""
    from ..media.saving import VideoFiles
    from ..media.video import check_target
    from ..request import GenerateRequest
    from ..terminal import ProgressLine, between_steps

    prompts = _prompts(prompt, prompt_file)
    targets = [out] if prompt_file is None else [_numbered(out, i) for i in range(len(prompts))]
    requests = [
        GenerateRequest(
            prompt=text, image=image, negative_prompt=negative_prompt, resolution=resolution, aspect_ratio=aspect_ratio,
            width=width, height=height, adaptive_resolution=adaptive_resolution, num_frames=num_frames, fps=fps,
            num_steps=num_steps, sampler=sampler, ode=ode, sigma_max=sigma_max, boundary=boundary,
            guidance_scale=guidance_scale, shift=shift, seed=seed, noise_device=noise_device, num_samples=num_samples,
            attention=attention, sla_topk=sla_topk, precision=precision, norms=norms, memory=memory,
            gpu_budget=gpu_budget,
        )
        for text in prompts
    ]  # fmt: skip
    for target in targets:  # all that can be wrong is found before the weights are read
        check_target(target, num_frames=num_frames or 2)  # unless one is asked for, there will be several

    from ..checkpoints.find import default_model
    from ..engine import Engine, Progress
    from ..media.preview import PreviewFile
    from ..media.terminal_picture import TerminalPicture

    picture = TerminalPicture(sys.stderr)
    previews = [PreviewFile(target, picture) if preview else None for target in targets]

    if not any((model, transformer, high_noise, low_noise)):
        model = default_model(image is not None)
    engine = Engine.load(
        model, transformer=transformer, high_noise=high_noise, low_noise=low_noise, vae=vae, text_encoder=text_encoder,
        tokenizer=tokenizer, image_encoder=image_encoder, device=device,
    )  # fmt: skip
    if explain:
        _explain(engine, requests, print_json)
        return
    line = ProgressLine()
    with between_steps() as check:

        def progress(at: Progress) -> None:
            check()
            line(at)

        for request, target, show in zip(requests, targets, previews, strict=True):
            check()
            with VideoFiles(target) as out_files:
                result = engine.generate(request, progress, out_files, show)
                files = [str(path) for path in out_files.close(result)]
            print(json.dumps({"files": files, **result.summary()}) if print_json else "\n".join(files), flush=True)
            if sys.stderr.isatty():
                stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.stages.items() if seconds)
                print(f"seconds: {stages}", file=sys.stderr)


def _explain(engine: Engine, requests: Sequence[GenerateRequest], print_json: bool) -> None:
    """The plan of each request that differs from those before it. Nothing is loaded."""
    from .table import print_table

    seen = []
    for request in requests:
        plan = engine.plan(request)
        if plan.as_dict() in seen:
            continue
        seen.append(plan.as_dict())
        if print_json:
            print(json.dumps(plan.as_dict()))
        else:
            print_table(f"Memory {plan.mode}: {plan.summary}", list(plan.rows()), ("what", "at most", "how"))


def _prompts(prompt: str | None, prompt_file: Path | None) -> list[str]:
    from ..errors import RequestError

    if prompt is not None and prompt_file is None:
        return [prompt]
    if prompt_file is None or prompt is not None:
        raise RequestError("give one of --prompt and --prompt-file")
    try:
        prompts = [line.strip() for line in prompt_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the prompt file {prompt_file} cannot be read as text: {error}") from error
    if not prompts:
        raise RequestError(f"the prompt file {prompt_file} has no prompts; write one a line")
    return prompts


def _numbered(path: Path, i: int) -> Path:
    return path.with_name(f"{path.stem}-{i:03d}{path.suffix}")
