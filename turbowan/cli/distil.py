"""`turbowan train sla | rcm | merge | shards | export`: towards a Wan of four steps and sparse attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RequestError

if TYPE_CHECKING:
    import torch

    from ..models.text_encoder import TextEncoder
    from ..models.tokenizer import Tokenizer
    from ..models.vae import WanVAE
    from ..train.data import Source
    from ..train.world import WorldConfig

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run: states, curve, result.")]
Teacher = Annotated[Path, typer.Option(help="The transformer to learn from, of any family.")]
Data = Annotated[
    list[str] | None,
    typer.Option(help="Latent shards: tar files, folders or patterns, repeatable. Without: the procedural world."),
]
Frames = Annotated[int | None, typer.Option(help="Latent frames to keep of each clip of --data; all by default.")]
Negative = Annotated[Path | None, typer.Option(help="Embedding of the negative prompt, for shards (.pt).")]
Model = Annotated[str, typer.Option(help="Whose VAE, text encoder and tokenizer make the procedural world.")]
Init = Annotated[Path | None, typer.Option(help="A transformer to begin from instead of the teacher's weights.")]
MaxMinutes = Annotated[float | None, typer.Option(help="Stop this run after so many minutes; run again to go on.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Config = Annotated[str, typer.Option(help="A shipped configuration or a TOML file.")]


def add_commands(app: typer.Typer) -> None:
    for command in (sla, rcm, merge, shards, export):
        app.command()(command)


def sla(
    out: Out, teacher: Teacher, config: Config = "tiny-sla", data: Data = None, frames: Frames = None,
    negative: Negative = None, model: Model = "tiny-base", init: Init = None, max_minutes: MaxMinutes = None,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Sparse-linear attention: align a transformer with SLA to the dense one it was; writes transformer.safetensors."""
    from ..train.distil import train_sla
    from ..train.sla import SLAConfig

    clips = Clips(data, frames, negative, model)
    _run(train_sla, "sla", SLAConfig, out, teacher, config, clips, init, max_minutes, device)


def rcm(
    out: Out, teacher: Teacher, config: Config = "tiny-rcm", data: Data = None, frames: Frames = None,
    negative: Negative = None, model: Model = "tiny-base", init: Init = None, max_minutes: MaxMinutes = None,
    device: Device = "auto",
) -> None:  # fmt: skip
    """rCM distillation: a many-step teacher becomes a student of 1 to 4 steps; writes transformer.safetensors, or with
    a boundary high_noise.safetensors and low_noise.safetensors."""
    from ..train.distil import train_rcm
    from ..train.rcm import RCMConfig

    clips = Clips(data, frames, negative, model)
    _run(train_rcm, "rcm", RCMConfig, out, teacher, config, clips, init, max_minutes, device)


@dataclass(frozen=True)
class Clips:
    """What a stage trains on: shards, or the procedural world of a model.

    Raises:
        RequestError: an option of shards is given without any.
    """

    data: list[str] | None
    frames: int | None
    negative: Path | None
    model: str

    def __post_init__(self) -> None:
        for option, value in (("--frames", self.frames), ("--negative", self.negative)):
            if value is not None and not self.data:
                raise RequestError(f"{option} is of the clips of --data; name these too, or leave it out")

    @contextmanager
    def source(self, config: WorldConfig, batch: int, seed: int, device: torch.device) -> Iterator[Source]:
        """Ends the threads that read shards, however the work with it ends."""
        if self.data:
            from ..train.shard_source import ShardSource
            from ..train.shards import Shards

            with closing(ShardSource(Shards(self.data, self.frames), batch, device, seed, self.negative)) as read:
                yield read
        else:
            from ..train.world import World

            yield World(config, *_world_parts(self.model, device), device, seed)


def _run(
    train: Any, table: str, kind: type, out: Path, teacher: Path, config: str, clips: Clips, init: Path | None,
    max_minutes: float | None, device: str,
) -> None:  # fmt: skip
    from ..engine import choose_device
    from ..train import distributed
    from ..train.config import read_tables
    from ..train.trainer import TrainerConfig
    from ..train.world import WorldConfig

    settings = read_tables(config, trainer=TrainerConfig, world=WorldConfig, **{table: kind})
    trainer = settings["trainer"]
    where = distributed.join(choose_device(device))
    with clips.source(settings["world"], trainer.batch, trainer.seed, where) as source:
        results = train(settings[table], trainer, teacher, source, out, where, max_minutes, init)
    if distributed.rank() == 0:
        print(*results or [f"{out}: not done yet; run again to go on"], sep="\n")
    distributed.leave()  # not after an error: the others may be waiting for this process, and leaving waits for them


def _world_parts(model: str, device: torch.device) -> tuple[WanVAE, Tokenizer, TextEncoder]:
    """What makes latents and texts of the procedural world's clips and captions."""
    import torch

    from ..checkpoints import load_text_encoder, load_vae
    from ..checkpoints.find import find_model
    from ..checkpoints.tokenizer import find_tokenizer

    files = find_model(model, {}).files
    vae = load_vae(files["vae"], device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    tokenizer = find_tokenizer(files["text_encoder"], files.get("tokenizer"))
    return vae, tokenizer, load_text_encoder(files["text_encoder"], device)


def merge(
    base: Annotated[Path, typer.Argument(help="Whose weights are updated, e.g. an rCM student.")],
    before: Annotated[Path, typer.Argument(help="The transformer before a training, e.g. Wan as published.")],
    after: Annotated[Path, typer.Argument(help="The same after it, e.g. fine-tuned with SLA.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write base + weight (after - before).")],
    weight: Annotated[float, typer.Option(help="How much of the update.")] = 1.0,
    to: Annotated[str | None, typer.Option(help="Layout of the result; the base's own by default.")] = None,
) -> None:
    """Apply one training's parameter update to another model, of any mix of checkpoint families."""
    from ..clock import Progress
    from ..terminal import ProgressLine
    from ..train.merge import merge_checkpoints

    line = ProgressLine()
    print(
        merge_checkpoints(
            base, before, after, out, weight, to, lambda done, total: line(Progress("merge", done, total))
        )
    )


def shards(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the tar files.")],
    count: Annotated[int, typer.Option(help="Clips.")],
    config: Config = "tiny-rcm",
    model: Model = "tiny-base",
    per_shard: Annotated[int, typer.Option(help="Clips a file.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the clips.")] = 0,
    device: Device = "auto",
) -> None:
    """The procedural world as latent shards, the tar files official trainers read; goes on where it stopped. Under
    torchrun the processes take turns."""
    from ..clock import Progress
    from ..engine import choose_device
    from ..terminal import ProgressLine
    from ..train import distributed
    from ..train.config import read_table
    from ..train.world import WorldConfig
    from ..train.world_shards import write_world_shards

    settings = read_table(config, "world", WorldConfig)
    where = distributed.join(choose_device(device))
    line = ProgressLine()

    def report(done: int, total: int) -> None:
        if distributed.rank() == 0:
            line(Progress("shards", done, total))

    write_world_shards(settings, count, out, *_world_parts(model, where), where, seed, per_shard, report)
    distributed.wait_for_all()
    if distributed.rank() == 0:
        print(out)
    distributed.leave()


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of one of its states.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File, or folder for diffusers.")],
    to: Annotated[str, typer.Option(help="Layout: official, wan, comfy, diffusers or turbowan.")] = "official",
    net: Annotated[str, typer.Option(help="average, or a trained net: student, critic.")] = "average",
) -> None:
    """A run's newest state as a transformer file of any checkpoint family."""
    from ..train.export import export_transformer

    for path in export_transformer(run, out, to, net):
        print(path)
