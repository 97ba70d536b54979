"""From a request to frames. The one place that knows the order of the stages."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .checkpoints.find import EMBEDDED as EMBEDDED
from .checkpoints.find import check_parts, find_model
from .checkpoints.load import choose_attention
from .checkpoints.manifest import TRANSFORMERS, Manifest
from .checkpoints.tokenizer import find_tokenizer
from .clock import Progress as Progress
from .clock import ProgressCallback
from .errors import CheckpointError, MachineError, Note, RequestError
from .machine import check_torch, peak_host_memory
from .media.image import read_image
from .memory.plan import make_plan, weight_bytes
from .memory.residency import Residency
from .request import FrameSink, GenerateRequest, GenerateResult
from .settings import resolve
from .stages import Execution, PreviewCallback, Run


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
        self.parts = Residency()
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
        image = None if request.image is None else read_image(request.image)
        if (image is None) == self.needs_image:
            need = "makes videos from an image; give one" if self.needs_image else "is text-to-video; it takes no image"
            raise RequestError(f"{self.manifest.name} {need}")
        settings = resolve(request, self.manifest, None if image is None else image.size)
        attention = choose_attention(
            self.config, self.manifest.name, settings.attention, settings.sla_topk, **self.blocks
        )
        settings = replace(settings, attention=attention.kind, num_samples=len(prompts))
        how = Execution.of(request, self.device, attention, self.outlines)
        if request.precision == "auto":
            for line in how.changes(self.outlines):
                warnings.warn(line, Note, stacklevel=2)
        sizes = self.part_sizes(how.dtype, how)
        plan = make_plan(request.memory, sizes, self.device, request.gpu_budget, self.parts.nbytes)
        self.parts.keep = plan.keep
        facts = {"model": self.manifest.name, **settings.as_dict(), **how.facts()}
        if sink is not None:
            sink.begin(settings.num_samples, settings.num_frames, settings.fps, facts)
        report = progress or (lambda _: None)
        run = Run(self.manifest, self.config.image_dim, self.tokenizer, self.parts, settings, how, report)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            with run.clock.stage("total", exclusive=False):
                texts = run.encode_text(prompts)
                latent = run.denoise(run.condition(texts, image), preview)
                videos = run.decode(latent, sink)
        except torch.OutOfMemoryError as error:
            self.parts.clear()
            size = f"{settings.num_samples} x {settings.num_frames} frames of {settings.width}x{settings.height}"
            raise MachineError(
                f"{self.device} ran out of memory making {size} ({plan.reason});"
                " take --memory minimal, a quantised file, or fewer frames or pixels"
            ) from error
        return GenerateResult(
            videos=videos,
            fps=settings.fps,
            seed=settings.seed,
            settings=facts,
            stages=run.clock.seconds,
            peak_memory=peak_memory(self.device),
        )

    @property
    def needs_image(self) -> bool:
        return self.config.in_dim > self.config.out_dim

    def part_sizes(self, dtype: torch.dtype, how: Execution | None = None) -> dict[str, int]:
        """Bytes of weights per role, once loaded in this dtype; `how` tells which transformers are expanded to it."""
        whole = {role for role, choice in how.linears.items() if choice.format == "bf16"} if how else set()
        return {role: weight_bytes(part, dtype, role in whole) for role, part in self.outlines.items()}


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
