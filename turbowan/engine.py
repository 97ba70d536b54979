"""From a request to frames. The one place that knows the order of the stages."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL.Image import Image

from .checkpoints.find import EMBEDDED as EMBEDDED
from .checkpoints.find import check_parts, find_model
from .checkpoints.load import choose_attention
from .checkpoints.manifest import TRANSFORMERS, Manifest
from .checkpoints.tokenizer import find_tokenizer
from .clock import Progress as Progress
from .clock import ProgressCallback
from .errors import CheckpointError, MachineError, Note, RequestError
from .machine import check_torch, peak_host_memory, size_text, trim_heap
from .media.image import read_image
from .memory.activations import Work
from .memory.nearest import nearest
from .memory.plan import Model, Plan, make_plan
from .memory.residency import Residency
from .memory.room import capped, find_room
from .memory.sizes import PartSize, part_size
from .request import FrameSink, GenerateRequest, GenerateResult
from .settings import Settings, resolve
from .stages import Execution, PreviewCallback, Run

EIGHT_BIT = ("int8_row", "fp8_row", "int8_block")


class Engine:
    """A model ready to generate. Make one with `Engine.load`."""

    def __init__(
        self,
        manifest: Manifest,
        device: torch.device,
        block_q: int | None = None,
        block_k: int | None = None,
    ) -> None:
        self.manifest, self.device = manifest, device
        self.blocks = {"block_q": block_q, "block_k": block_k}
        self.outlines = check_parts(manifest)
        self.config = next(self.outlines[role].config for role in TRANSFORMERS if role in self.outlines)
        self.parts = Residency(device)
        self.tokenizer = find_tokenizer(manifest.files["text_encoder"], manifest.files.get("tokenizer"))

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        transformer: str | Path | None = None,
        high_noise: str | Path | None = None,
        low_noise: str | Path | None = None,
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
        tokenizer: str | Path | None = None,
        image_encoder: str | Path | None = None,
        device: str | torch.device = "auto",
        block_q: int | None = None,
        block_k: int | None = None,
    ) -> Engine:
        """Find a model's files and check that they fit together. Weights are read when first needed.

        Args:
            model: "tiny" (embedded, the default), a folder, or a manifest. Named files replace its own.
            transformer, or high_noise and low_noise: the diffusion transformer(s), of any family we read.
            device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1" …
            block_q, block_k: tokens per attention block, 128 and 64 by default.

        Raises:
            CheckpointError: a file is missing, unreadable, or does not fit the others.
            MachineError: the device is not there.
        """
        named = {
            "transformer": transformer, "high_noise": high_noise, "low_noise": low_noise, "vae": vae,
            "text_encoder": text_encoder, "tokenizer": tokenizer, "image_encoder": image_encoder,
        }  # fmt: skip
        files = {role: Path(path) for role, path in named.items() if path is not None}
        check_torch()
        for role, path in files.items():
            if not path.exists():
                raise CheckpointError(f"{role.replace('_', ' ')} file {path} does not exist")
        return cls(find_model(model, files), choose_device(device), block_q, block_k)

    def generate(
        self,
        request: GenerateRequest,
        progress: ProgressCallback | None = None,
        sink: FrameSink | None = None,
        preview: PreviewCallback | None = None,
    ) -> GenerateResult:
        """Carry out one request.

        Args:
            progress: called as stages go on; an exception it raises ends the generation between two steps.
            sink: gets the frames while later ones are decoded, such as `media.saving.VideoFiles`, which writes them.
            preview: called with each step (from 1) and what it takes the clean videos to be, uint8 [B, T, h, w, 3]:
                an eighth of the size, the first frame and one of every four after it.

        Raises:
            RequestError: the request does not fit the model.
        """
        return self.generate_batch([request.prompt] * request.num_samples, request, progress, sink, preview)

    @torch.inference_mode()
    def generate_batch(
        self,
        prompts: Sequence[str],
        request: GenerateRequest,
        progress: ProgressCallback | None = None,
        sink: FrameSink | None = None,
        preview: PreviewCallback | None = None,
    ) -> GenerateResult:
        """One sample for each prompt, together; all else is the request's (its prompt and num_samples do not count)."""
        job = self._prepare(request, len(prompts))
        if request.precision == "auto":
            for line in job.how.changes(self.outlines):
                warnings.warn(line, Note, stacklevel=2)
        plan, settings = job.plan, job.settings
        if plan.host > plan.room.host:
            had = size_text(plan.room.host)
            note = f"weights take {size_text(plan.host)} of the host's memory, which has {had}: it may swap"
            warnings.warn(note, Note, stacklevel=2)
        self.parts.follow(plan.places)
        facts = {"model": self.manifest.name, **settings.as_dict(), **job.how.facts()}
        if sink is not None:
            sink.begin(settings.num_samples, settings.num_frames, settings.fps, facts)
        report = progress or (lambda _: None)
        run = Run(self.manifest, self.config.image_dim, self.tokenizer, self.parts, settings, job.how, report, plan)
        foreign = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            foreign = torch.cuda.memory_allocated(self.device) - self.parts.nbytes
        try:
            with capped(self.device, plan.cap, plan.tight), run.clock.stage("total", exclusive=False):
                run.begin_loading()
                texts = run.encode_text(prompts)
                run.finish_loading()
                self.parts.tidy(foreign)
                condition = run.condition(texts, job.image)
                self.parts.tidy(foreign)
                latent = run.denoise(condition, preview)
                self.parts.tidy(foreign)
                videos = run.decode(latent, sink)
                self.parts.tidy(foreign)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # whoever keeps the error would keep what they hold
            self.parts.clear()
            size = f"{settings.num_samples} x {settings.num_frames} frames of {settings.width}x{settings.height}"
            raise MachineError(
                f"{self.device} ran out of memory making {size} ({plan.reason});"
                " take --memory minimal, a quantised file, or fewer frames or pixels"
            ) from error
        except BaseException:
            self.parts.rest()
            raise
        finally:
            trim_heap()
        return GenerateResult(
            videos=videos,
            fps=settings.fps,
            seed=settings.seed,
            settings=facts,
            stages=run.clock.seconds,
            peak_memory=peak_memory(self.device),
        )

    def plan(self, request: GenerateRequest) -> Plan:
        """Where each part would live and what each stage would take. Nothing is loaded.

        Raises:
            RequestError: the request does not fit the model. MachineError: it does not fit in memory; the line names
                the nearest that does.
        """
        return self._prepare(request, request.num_samples).plan

    def _prepare(self, request: GenerateRequest, samples: int, advise: bool = True) -> Job:
        image = None if request.image is None else read_image(request.image)
        if (image is None) == self.needs_image:
            need = "makes videos from an image; give one" if self.needs_image else "is text-to-video; it takes no image"
            raise RequestError(f"{self.manifest.name} {need}")
        settings = resolve(request, self.manifest, None if image is None else image.size)
        attention = choose_attention(
            self.config, self.manifest.name, settings.attention, settings.sla_topk, **self.blocks
        )
        settings = replace(settings, attention=attention.kind, num_samples=samples)
        how = Execution.of(request, self.device, attention, self.outlines)
        model = Model(
            self.manifest.name, self.part_sizes(how.dtype, how), self.config,
            self.outlines["text_encoder"].width, self.outlines["vae"].dim,
        )  # fmt: skip
        room = find_room(self.device, request.gpu_budget, self.parts.nbytes, self.parts.host_bytes)
        try:
            plan = make_plan(model, work_of(settings, how, image is not None), room, request.memory)
        except MachineError as error:
            if not advise:
                raise
            request = replace(request, image=image)  # read once
            other = nearest(request, settings.width, settings.height, settings.num_frames, self._fits)
            raise MachineError(f"{error}; {other or 'nothing smaller fits either'}") from error
        return Job(image, settings, how, plan)

    def _fits(self, request: GenerateRequest) -> bool:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Note)
                self._prepare(request, request.num_samples, advise=False)
        except MachineError:
            return False
        return True

    @property
    def needs_image(self) -> bool:
        return self.config.in_dim > self.config.out_dim

    def part_sizes(self, dtype: torch.dtype, how: Execution | None = None) -> dict[str, PartSize]:
        """Weights per role, once loaded in this dtype; `how` tells which formats the transformers' layers get."""
        formats = {role: choice.format for role, choice in how.linears.items()} if how else {}
        return {role: part_size(part, dtype, formats.get(role)) for role, part in self.outlines.items()}


@dataclass(frozen=True)
class Job:
    """A request made ready: its picture, all values, how numbers are made, and the plan."""

    image: Image | None
    settings: Settings
    how: Execution
    plan: Plan


def work_of(settings: Settings, how: Execution, encodes_image: bool) -> Work:
    """What a plan needs to know of a request."""
    return Work(
        settings.width,
        settings.height,
        settings.num_frames,
        samples=settings.num_samples,
        noises=settings.num_steps if settings.sampler == "rcm" and not settings.ode else 1,
        guided=settings.guidance_scale != 1,
        attention=how.attention.kind,
        itemsize=how.dtype.itemsize,
        eight_bit=all(choice.format in EIGHT_BIT for choice in how.linears.values()),
        kernels=how.device.type == "cuda" and how.dtype != torch.float32,
        encodes_image=encodes_image,
    )


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA where PyTorch sees one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise MachineError(f"device must be auto, cpu, cuda or cuda:N, got '{device}'")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise MachineError(f"device '{device}' is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return chosen


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: the GPU's peak since the generation began, the process's peak on the host."""
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"gpu": int(gpu), "host": peak_host_memory()}
