"""`turbowan train`: the embedded model's own stages, in order tokenizer, vae, flow, pack; the rest is in `distil`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .distil import add_commands

app = typer.Typer(help="Training: the embedded model's stages, SLA, rCM; each goes on where its last run stopped.")

add_commands(app)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the stage: state, curve, results.")]
MaxMinutes = Annotated[float | None, typer.Option(help="Stop this run after so many minutes; run again to go on.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@app.command()
def tokenizer(out: Annotated[Path, typer.Option("--out", "-o", help="Where to write spiece.model.")]) -> None:
    """The SentencePiece tokenizer of the captions (seconds on a CPU)."""
    from ..train.tokenizer import train_tokenizer

    train_tokenizer(out)
    print(out)


@app.command()
def vae(
    out: Out,
    config: Annotated[str, typer.Option(help="A shipped configuration or a TOML file.")] = "tiny-vae",
    max_minutes: MaxMinutes = None,
    device: Device = "auto",
    clips: Annotated[int, typer.Option(help="Held-out clips to judge the result on.")] = 64,
) -> None:
    """The VAE; writes vae.safetensors with its latent statistics folded in, and report.json."""
    import torch

    from ..checkpoints.files import replacing, write_tensors
    from ..engine import choose_device
    from ..evaluate.reconstruction import GATE, evaluate_vae
    from ..train import distributed
    from ..train.config import read_config
    from ..train.vae import VAEConfig, fold_statistics, statistics_clips, train_vae

    where = distributed.join(choose_device(device))
    settings = read_config(config, VAEConfig)
    model = train_vae(settings, out, where, max_minutes)
    writes = distributed.rank() == 0
    distributed.leave()
    if not writes:
        return
    fold_statistics(model, statistics_clips(settings, where))
    model.to(torch.bfloat16)
    write_tensors(out / "vae.safetensors", model.state_dict())
    sizes = (settings.frames, settings.height, settings.width)
    report = {
        "gate": GATE,
        "shapes": evaluate_vae(model, clips, *sizes, device=where),
        "camera": evaluate_vae(model, max(1, clips // 2), *sizes, device=where, camera=True),
    }
    with replacing(out / "report.json") as partial:
        partial.write_text(json.dumps(report, indent=1))
    print(json.dumps(report))


@app.command()
def flow(
    out: Out,
    vae: Annotated[Path, typer.Option(help="The VAE's file.")],
    tokenizer: Annotated[Path, typer.Option(help="spiece.model.")],
    config: Annotated[str, typer.Option(help="A shipped configuration or a TOML file.")] = "tiny-flow",
    max_minutes: MaxMinutes = None,
    device: Device = "auto",
    init: Annotated[Path | None, typer.Option(help="Folder of another flow stage, to begin from its weights.")] = None,
    preview_clips: Annotated[int, typer.Option(help="Held-out prompts to sample at the end (text-to-video).")] = 64,
) -> None:
    """Transformer and text encoder by flow matching; writes both files and samples.png."""
    import torch

    from ..checkpoints import load_vae
    from ..checkpoints.tokenizer import find_tokenizer
    from ..engine import choose_device
    from ..evaluate.reconstruction import check_gate
    from ..train import distributed
    from ..train.config import read_config
    from ..train.flow import FlowConfig, export, preview, train_flow
    from ..train.tokenizer import VOCABULARY

    where = distributed.join(choose_device(device))
    settings = read_config(config, FlowConfig)
    words = find_tokenizer(tokenizer, tokenizer)
    report = vae.with_name("report.json")  # what the stage before says of its result
    if report.exists():
        check_gate(json.loads(report.read_text())["shapes"], str(vae))
    encoder = load_vae(vae, where, torch.bfloat16 if where.type == "cuda" else torch.float32)
    start = None if init is None else (init / "transformer.safetensors", init / "text_encoder.safetensors")
    model = train_flow(settings, out, encoder, words, VOCABULARY, where, max_minutes, start)
    writes = distributed.rank() == 0
    distributed.leave()
    if not writes:
        return
    export(model, out)
    if preview_clips and not settings.image:
        print(json.dumps(preview(model, settings, encoder, words, preview_clips, where, out / "samples.png")))


@app.command()
def pack(
    out: Annotated[Path, typer.Option("--out", "-o", help="The model's folder; its name is the model's.")],
    kind: Annotated[str, typer.Option(help="base (many steps), t2v or i2v (few steps).")],
    transformer: Annotated[Path | None, typer.Option(help="The transformer's file.")] = None,
    high_noise: Annotated[Path | None, typer.Option(help="High-noise expert, with --low-noise.")] = None,
    low_noise: Annotated[Path | None, typer.Option(help="Low-noise expert.")] = None,
    beside: Annotated[Path | None, typer.Option(help="Share VAE, text encoder and tokenizer of this model.")] = None,
    vae: Annotated[Path | None, typer.Option(help="The VAE's file, where none is shared.")] = None,
    text_encoder: Annotated[Path | None, typer.Option(help="The text encoder's.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="spiece.model.")] = None,
    sla_topk: Annotated[float, typer.Option(help="Share of key blocks kept, of a transformer with SLA.")] = 0.1,
    quantize: Annotated[bool, typer.Option(help="int8 in transformers and VAE.")] = True,
) -> None:
    """A model folder with manifest from the stages' files, in int8."""
    from ..errors import RequestError
    from ..train.pack import pack_model

    given = {"transformer": transformer, "high_noise": high_noise, "low_noise": low_noise}
    rest = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    if beside is None and None in rest.values():
        raise RequestError("give --beside with a model's folder, or --vae, --text-encoder and --tokenizer")
    transformers = {role: path for role, path in given.items() if path is not None}
    others = beside or {role: path for role, path in rest.items() if path is not None}
    print(pack_model(out, kind, transformers, others, sla_topk, quantize))
