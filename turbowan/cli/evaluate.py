"""`turbowan evaluate`: how much of a prompt is in the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Judge models on prompts and clips they never saw, with plain image analysis.")


@app.command()
def tiny(
    model: Annotated[str, typer.Option(help="A model made for the procedural world.")] = "tiny",
    prompts: Annotated[int | None, typer.Option(help="Held-out prompts; 1,000 on a GPU, 32 on a CPU.")] = None,
    camera_prompts: Annotated[int, typer.Option(help="Prompts of a moving camera besides.")] = 0,
    clips: Annotated[int, typer.Option(help="Held-out clips for the VAE.")] = 16,
    num_steps: Annotated[int | None, typer.Option(help="Steps; the manifest's by default.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance; the manifest's by default.")] = None,
    shift: Annotated[float | None, typer.Option(help="Time shift; the manifest's by default.")] = None,
    sampler: Annotated[str | None, typer.Option(help="rcm, euler or unipc.")] = None,
    attention: Annotated[str, typer.Option(help="auto, original, sla or sagesla.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32 or bf16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the first batch.")] = 0,
    batch: Annotated[int | None, typer.Option(help="Prompts generated together.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of report and sheet.")] = Path("out/evaluate"),
) -> None:
    """Held-out prompts right on colour, shape, direction and background, with 95 % intervals, and VAE fidelity."""
    import torch

    from ..checkpoints import load_vae
    from ..checkpoints.files import make_folder, replacing
    from ..engine import Engine
    from ..evaluate.prompts import evaluate_prompts
    from ..evaluate.reconstruction import evaluate_vae
    from ..request import GenerateRequest

    engine = Engine.load(model, device=device)
    on_gpu = engine.device.type == "cuda"
    request = GenerateRequest(
        prompt="-", num_steps=num_steps, guidance_scale=guidance_scale, shift=shift, sampler=sampler,
        attention=attention, precision=precision, seed=seed, memory="speed",
    )  # fmt: skip
    count = prompts or (1000 if on_gpu else 32)
    size = batch or (50 if on_gpu else 4)
    make_folder(out)
    manifest = engine.manifest
    report = {
        "model": model,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "steps": num_steps or manifest.num_steps,
        "guidance_scale": manifest.guidance_scale if guidance_scale is None else guidance_scale,
        "shift": manifest.shift if shift is None else shift,
        "sampler": sampler or manifest.sampler,
        "prompts": evaluate_prompts(engine, count, request, size, out / "sheet.png"),
    }
    if camera_prompts:
        report["camera"] = evaluate_prompts(engine, camera_prompts, request, size, out / "camera.png", camera=True)
    if clips:
        vae = load_vae(manifest.files["vae"], engine.device)
        height, width = manifest.height or 160, manifest.width or 256
        report["vae"] = evaluate_vae(vae, clips, manifest.num_frames, height, width, device=engine.device)
    with replacing(out / "report.json") as partial:
        partial.write_text(json.dumps(report, indent=1))
    print(json.dumps(report))
