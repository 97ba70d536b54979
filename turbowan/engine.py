"""From a request to frames: text, condition, denoise, decode. The one place that knows the order of the stages."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoints.detect import ROLES
from .checkpoints.load import (
    choose_attention,
    load_image_encoder,
    load_text_encoder,
    load_transformer,
    load_vae,
    read,
    transformer_config,
)
from .checkpoints.manifest import Manifest, check_manifest, find_in_folder, guess_manifest, read_manifest
from .checkpoints.tokenizer import find_tokenizer
from .errors import CheckpointError, MachineError, RequestError
from .media.image import read_image, to_tensor
from .memory.plan import file_bytes, make_plan
from .memory.residency import Residency
from .models.tokenizer import TEXT_LENGTH
from .models.transformer import TransformerConfig, WanTransformer
from .models.vae import LATENT_CHANNELS, SPATIAL_FACTOR, latent_frames
from .request import GenerateRequest, GenerateResult
from .sampling import flow, rcm
from .sampling.experts import expert_for
from .settings import Settings, resolve

EMBEDDED = Path(__file__).parent / "assets"
DECODE_PIXELS = {"cpu": 400_000, "cuda": 1_000_000}  # small samples are decoded together, up to so many pixels a frame
STAGES = ("text", "condition", "load", "denoise", "switch", "decode", "write", "total")


@dataclass(frozen=True)
class Progress:
    """Where a generation is: `done` of `total` within a stage ("text", "condition", "denoise", "decode")."""

    stage: str
    done: int
    total: int


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class Condition:
    """What a transformer gets besides latent and time. text: [B, L, D], its last row standing for all that follow."""

    text: Tensor
    empty_text: Tensor | None  # the negative prompt's, with guidance
    image: Tensor | None  # [B, 20, T, h, w]
    image_tokens: Tensor | None


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
        self.config = check_parts(manifest)
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
        for role, path in files.items():
            if not path.exists():
                raise CheckpointError(f"{role.replace('_', ' ')} file {path} does not exist")
        return cls(find_model(model, files), choose_device(device), block_q, block_k)

    def generate(self, request: GenerateRequest, progress: ProgressCallback | None = None) -> GenerateResult:
        """Carry out one request.

        Args:
            progress: called as stages go on; an exception it raises ends the generation between two steps.

        Raises:
            RequestError: the request does not fit the model.
        """
        return self.generate_batch([request.prompt] * request.num_samples, request, progress)

    @torch.inference_mode()
    def generate_batch(
        self, prompts: Sequence[str], request: GenerateRequest, progress: ProgressCallback | None = None
    ) -> GenerateResult:
        """One sample for each prompt, together; all else is the request's (its prompt and num_samples do not count)."""
        report = progress or (lambda _: None)
        image = None if request.image is None else read_image(request.image)
        if (image is None) == self.needs_image:
            need = "makes videos from an image; give one" if self.needs_image else "is text-to-video; it takes no image"
            raise RequestError(f"{self.manifest.name} {need}")
        settings = resolve(request, self.manifest, None if image is None else image.size)
        attention = choose_attention(
            self.config, self.manifest.name, settings.attention, settings.sla_topk, **self.blocks
        )
        settings = replace(settings, attention=attention.kind, num_samples=len(prompts))
        plan = make_plan(request.memory, self.part_sizes(), self.device, request.gpu_budget)
        self.parts.keep = plan.keep
        run = _Run(self, settings, _dtype(request.precision, self.device), attention, request.norms, report)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with run.clock.stage("total", exclusive=False):
            texts = run.encode_text(prompts)
            pixels = None if image is None else to_tensor(image, settings.height, settings.width)
            latent = run.denoise(run.condition(texts, pixels))
            videos = run.decode(latent)
        return GenerateResult(
            videos=videos,
            fps=settings.fps,
            seed=settings.seed,
            settings={"model": self.manifest.name, **settings.as_dict()},
            stages=run.clock.seconds,
            peak_memory=peak_memory(self.device),
        )

    @property
    def needs_image(self) -> bool:
        return self.config.in_dim > self.config.out_dim

    def part_sizes(self) -> dict[str, int]:
        """Bytes of weights per role."""
        return {role: file_bytes(path) for role, path in self.manifest.files.items() if role != "tokenizer"}


def find_model(model: str | Path | None, files: dict[str, Path]) -> Manifest:
    """The manifest of a model by name, folder, manifest file or named files; named files stand before the model's."""
    if model is None and {"transformer", "high_noise", "low_noise"} & set(files):
        return guess_manifest("model", files)
    manifest = _find_named(str(model or "tiny"))
    if not files:
        return manifest
    own = dict(manifest.files)
    if {"transformer", "high_noise", "low_noise"} & set(files):
        own = {role: path for role, path in own.items() if role not in ("transformer", "high_noise", "low_noise")}
    manifest = replace(manifest, files={**own, **files})
    check_manifest(manifest, manifest.name)
    return manifest


def _find_named(model: str) -> Manifest:
    embedded = EMBEDDED / model
    if "/" not in model and (embedded / "turbowan.toml").exists():
        return read_manifest(embedded)
    path = Path(model).expanduser()
    if path.is_dir():
        return find_in_folder(path)
    if path.suffix == ".toml":
        return read_manifest(path)
    if path.exists():
        raise CheckpointError(f"{path} is a single file; name it as --transformer, with --vae and --text-encoder")
    known = ", ".join(sorted(p.parent.name for p in EMBEDDED.glob("*/turbowan.toml"))) or "none"
    raise CheckpointError(f"there is no model '{model}': it is no folder, no manifest and not embedded ({known})")


def check_parts(manifest: Manifest) -> TransformerConfig:
    """See from names, shapes and dtypes alone that all files serve their roles and fit each other.

    Returns:
        The transformers' sizes.
    """
    configs = {}
    for name, path in manifest.experts.items():
        state, _ = read(path, "transformer")
        configs[name] = transformer_config(state, str(path))
    config = next(iter(configs.values()))
    if manifest.two_experts and configs["high"] != configs["low"]:
        high, low = configs["high"], configs["low"]
        raise CheckpointError(
            "the two experts differ: high noise has width {}, {} blocks, {} input channels; low noise has {}, {}, {}".format(
                high.dim, high.num_layers, high.in_dim, low.dim, low.num_layers, low.in_dim
            )
        )
    for role in ("vae", "text_encoder", "image_encoder"):
        if role not in manifest.files:
            continue
        state, _ = read(manifest.files[role], role)
        if role == "text_encoder" and "shared.weight" in state and state["shared.weight"].shape[1] != config.text_dim:
            raise CheckpointError(
                f"the text encoder gives width {state['shared.weight'].shape[1]},"
                f" but the transformer takes text of width {config.text_dim}"
            )
    if config.image_dim is not None and "image_encoder" not in manifest.files:
        raise CheckpointError(f"{manifest.name} takes CLIP image tokens; give its {ROLES['image_encoder']} too")
    return config


class _Run:
    """One generation: the stages in order, sharing settings, parts and a clock."""

    def __init__(
        self, engine: Engine, settings: Settings, dtype: torch.dtype, attention: Any, norms: str, report: ProgressCallback
    ) -> None:
        self.engine, self.settings, self.dtype = engine, settings, dtype
        self.attention, self.norms, self.report = attention, norms, report
        self.parts, self.device, self.files = engine.parts, engine.device, engine.manifest.files
        self.clock = Clock(self.device)

    def _part(self, role: str, load: Callable[..., Any]) -> Any:
        path = self.files[role]
        with self.clock.stage("load"):
            return self.parts.get((role, self.dtype), lambda: load(path, self.device, self.dtype))

    def _done(self, role: str) -> None:
        self.parts.done((role, self.dtype))

    def encode_text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Embeddings [B, L, D] of the prompts and, with guidance, of the negative prompt as often."""
        guided = self.settings.guidance_scale != 1
        distinct = list(dict.fromkeys([*prompts, *([self.settings.negative_prompt] if guided else [])]))
        self.report(Progress("text", 0, 1))
        encoder = self._part("text_encoder", load_text_encoder)
        with self.clock.stage("text"):
            ids, mask = self.engine.tokenizer(distinct)
            rows = min(TEXT_LENGTH, int(mask.sum(dim=1).max()) + 1)  # the row after the prompt stands for the rest
            text = encoder(ids[:, :rows].to(self.device), mask[:, :rows].to(self.device))
        self._done("text_encoder")
        self.report(Progress("text", 1, 1))
        wanted = text[[distinct.index(prompt) for prompt in prompts]]
        return wanted, text[-1:].expand(len(prompts), -1, -1) if guided else None

    def condition(self, texts: tuple[Tensor, Tensor | None], image: Tensor | None) -> Condition:
        """Everything the transformer is told, for all samples."""
        n = self.settings.num_samples
        if image is None:
            return Condition(*texts, None, None)
        self.report(Progress("condition", 0, 1))
        tokens = None
        if self.engine.config.image_dim is not None:
            image_encoder = self._part("image_encoder", load_image_encoder)
            with self.clock.stage("condition"):
                tokens = image_encoder(image.to(self.device)).expand(n, -1, -1)
            self._done("image_encoder")
        vae = self._part("vae", load_vae)
        with self.clock.stage("condition"):
            latent = vae.encode_first_frame(image.to(self.device), self.settings.num_frames)
            mask = torch.zeros_like(latent[:, :4])
            mask[:, :, 0] = 1
            known = torch.cat([mask, latent], dim=1).expand(n, -1, -1, -1, -1)
        self._done("vae")
        self.report(Progress("condition", 1, 1))
        return Condition(*texts, known, tokens)

    def denoise(self, condition: Condition) -> Tensor:
        """The final latent, float32 [B, 16, T, h, w]."""
        settings = self.settings
        shape = (
            settings.num_samples, LATENT_CHANNELS, latent_frames(settings.num_frames),
            settings.height // SPATIAL_FACTOR, settings.width // SPATIAL_FACTOR,
        )  # fmt: skip
        velocity = self._velocity_function(condition, rounded=settings.sampler == "rcm")

        def on_step(i: int, latent: Tensor, t: float) -> None:
            self.report(Progress("denoise", i + 1, settings.num_steps))

        self.report(Progress("denoise", 0, settings.num_steps))
        with self.clock.stage("denoise"):
            if settings.sampler == "rcm":
                times = rcm.timesteps(settings.num_steps, settings.sigma_max)
                noises = self._noises(shape, 1 if settings.ode else settings.num_steps)
                latent = rcm.sample(velocity, noises, times, settings.ode, on_step)
            else:
                times = flow.timesteps(settings.num_steps, settings.shift)
                latent = flow.sample(velocity, self._noises(shape, 1)[0], times, settings.sampler, on_step)
        for name in self.engine.manifest.experts:
            self._done(_ROLE_OF[name])
        return latent

    def _noises(self, shape: Sequence[int], count: int) -> list[Tensor]:
        """Standard normal tensors, one draw each from one generator, on the engine's device."""
        device = self.settings.noise_device
        if device == "cuda" and not torch.cuda.is_available():
            raise MachineError("noise_device 'cuda' needs a CUDA device; this machine has none (use 'cpu')")
        generator = torch.Generator(device).manual_seed(self.settings.seed)
        return [torch.randn(shape, generator=generator, device=device).to(self.device) for _ in range(count)]

    def _velocity_function(self, condition: Condition, rounded: bool) -> rcm.VelocityFunction:
        """The model as samplers see it. `rounded` gives the net bfloat16 values of latent and time, as rCM's code does."""
        settings = self.settings

        def velocity(latent: Tensor, t: float, step: int) -> Tensor:
            net = self._transformer(t)
            timestep = torch.tensor(t, dtype=torch.float32) * 1000
            latent = latent.float()
            if rounded:
                latent, timestep = latent.to(torch.bfloat16).float(), timestep.to(torch.bfloat16).float()
            times = timestep.to(self.device).expand(latent.shape[0])

            def evaluate(text: Tensor) -> Tensor:
                return net(latent, times, text, condition.image, condition.image_tokens, text_rows=TEXT_LENGTH)

            wanted = evaluate(condition.text)
            if condition.empty_text is None:
                return wanted
            unwanted = evaluate(condition.empty_text)
            return unwanted + settings.guidance_scale * (wanted - unwanted)

        return velocity

    def _transformer(self, t: float) -> WanTransformer:
        manifest = self.engine.manifest
        name = expert_for(t, self.settings.boundary) if manifest.two_experts else "single"
        if name == "low":
            with self.clock.stage("switch"):
                self._done("high_noise")
                net = self._part("low_noise", load_transformer)
        else:
            net = self._part(_ROLE_OF[name], load_transformer)
        net.attention, net.norms = self.attention, self.norms
        return net

    def decode(self, latent: Tensor) -> list[np.ndarray]:
        """uint8 [T, H, W, 3] per sample."""
        vae = self._part("vae", load_vae)
        videos = []
        done, total = 0, self.settings.num_samples * latent.shape[2]
        self.report(Progress("decode", 0, total))
        together = max(1, DECODE_PIXELS[self.device.type] // (self.settings.width * self.settings.height))
        with self.clock.stage("decode"):
            for samples in latent.split(together):
                chunks = []
                for chunk in vae.decode_stream(samples):
                    chunks.append(to_uint8(chunk).cpu())
                    done += len(samples)
                    self.report(Progress("decode", done, total))
                videos += list(torch.cat(chunks, dim=2).permute(0, 2, 3, 4, 1).contiguous().numpy())
        self._done("vae")
        return videos


_ROLE_OF = {"single": "transformer", "high": "high_noise", "low": "low_noise"}


class Clock:
    """Seconds per stage. Stages nest: a part loaded while denoising counts as load, not as denoise."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._device = device
        self._inner = [0.0]  # seconds already given to stages inside the open ones

    @contextmanager
    def stage(self, name: str, exclusive: bool = True) -> Iterator[None]:
        started = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            elapsed = time.perf_counter() - started
            inside = self._inner.pop()
            self.seconds[name] += elapsed - inside if exclusive else elapsed
            self._inner[-1] += elapsed


def to_uint8(video: Tensor) -> Tensor:
    """-1..1 (clamped) to bytes: trunc(255 v + 0.5) of v in 0..1, as the official code writes them."""
    return ((video.clamp(-1, 1) + 1) * 0.5 * 255 + 0.5).to(torch.uint8)


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA where PyTorch sees one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise MachineError(f"device '{device}' is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return chosen


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if precision == "float32" else torch.bfloat16


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: the GPU's peak since the generation began, the process's peak on the host."""
    scale = 1 if sys.platform == "darwin" else 1024
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"gpu": int(gpu), "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
