"""The stages of one generation: text, condition, denoise, decode. The engine calls them in this order."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from .checkpoints.assign import Report
from .checkpoints.files import file_identity
from .checkpoints.load import load_image_encoder, load_text_encoder, load_transformer, load_vae
from .checkpoints.manifest import TRANSFORMERS, Manifest
from .clock import Clock, Progress, ProgressCallback
from .errors import MachineError
from .media.image import to_tensor
from .media.preview import fit_colours, to_colours
from .media.transfer import to_host
from .memory.plan import Plan
from .memory.residency import Residency
from .models.pack import file_format, prepare_block
from .models.tokenizer import TEXT_LENGTH, Tokenizer
from .models.transformer import AttentionConfig, Context, WanTransformer
from .models.vae import LATENT_CHANNELS, SPATIAL_FACTOR, latent_frames
from .ops import FormatChoice, choose_format, compute_dtype
from .ops.rows import FORMATS
from .request import FrameSink, GenerateRequest
from .sampling import flow, noise, rcm
from .sampling.experts import expert_for
from .settings import Settings

DECODE_PIXELS = {"cpu": 400_000, "cuda": 1_000_000}  # small samples are decoded together, up to so many pixels a frame
LINEAR_FORMATS = {"int8": "int8_row", "fp8": "fp8_row", "int8_block": "int8_block"}  # by the request's precision
LOADERS: dict[str, Callable[..., Any]] = {
    "text_encoder": load_text_encoder, "image_encoder": load_image_encoder, "vae": load_vae,
    **dict.fromkeys(TRANSFORMERS, load_transformer),
}  # fmt: skip
PreviewCallback = Callable[[int, np.ndarray], None]
_ROLE_OF = {"single": "transformer", "high": "high_noise", "low": "low_noise"}


@dataclass(frozen=True)
class Condition:
    """What a transformer gets besides latent and time. text: [B, L, D], its last row standing for all that follow."""

    text: Tensor
    empty_text: Tensor | None  # the negative prompt's, with guidance
    image: Tensor | None  # [B, 20, T, h, w]
    image_tokens: Tensor | None


@dataclass(frozen=True)
class Execution:
    """How the numbers are made, whatever they mean.

    dtype: of weights and activations. linears: by the transformer's role, what its linear layers run in, and why.
    """

    device: torch.device
    dtype: torch.dtype
    attention: AttentionConfig
    norms: str
    linears: Mapping[str, FormatChoice]

    @classmethod
    def of(
        cls,
        request: GenerateRequest,
        device: torch.device,
        attention: AttentionConfig,
        outlines: Mapping[str, nn.Module],
    ) -> Execution:
        """As a request wants it.

        "float32" and "bf16" name the dtype and leave linear layers as the files have them; all else leaves the dtype to
        the device. "auto" also leaves it the format of linear layers: see `ops.choose_format`.

        Args:
            outlines: the parts by role, on the meta device.
        """
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        dtype = {"float32": torch.float32, "bf16": torch.bfloat16}.get(request.precision, compute_dtype(capability))
        files = {role: file_format(part) for role, part in outlines.items() if role in TRANSFORMERS}
        if request.precision == "auto":
            linears = {role: choose_format(capability, own) for role, own in files.items()}
        else:
            wanted = LINEAR_FORMATS.get(request.precision)
            linears = {role: FormatChoice(wanted or own, "as asked for") for role, own in files.items()}
        return cls(device, dtype, attention, request.norms, linears)

    def variant(self, role: str) -> tuple[torch.dtype, str | None]:
        """What tells two loaded forms of a part apart."""
        return self.dtype, self.linears[role].format if role in self.linears else None

    def facts(self) -> dict[str, str]:
        """For a record. precision: the dtype; linears: "int8_row", say, or each expert's format where they differ."""
        formats = {role: choice.format for role, choice in self.linears.items()}
        one = len(set(formats.values())) == 1
        linears = next(iter(formats.values())) if one else ", ".join(f"{role} {f}" for role, f in formats.items())
        return {"precision": str(self.dtype).removeprefix("torch."), "linears": linears}

    def changes(self, outlines: Mapping[str, nn.Module]) -> Iterator[str]:
        """A line for each transformer whose linear layers run in another format than its file's."""
        for role, choice in self.linears.items():
            own = file_format(outlines[role])
            if choice.format != own:
                yield (
                    f"{role.replace('_', ' ')}: linear layers run as {choice.format} ({choice.why});"
                    f" --precision bf16 keeps the file's {own}"
                )


class Run:
    """One generation: the stages in order, sharing settings, parts and a clock.

    Args:
        manifest: the model. image_dim: width of its CLIP tokens, None where it takes none. plan: that `parts` follows.

    Raises:
        RequestError, MachineError: a time grid or a source of noise that cannot be had, before any work is done.
    """

    def __init__(
        self,
        manifest: Manifest,
        image_dim: int | None,
        tokenizer: Tokenizer,
        parts: Residency,
        settings: Settings,
        how: Execution,
        report: ProgressCallback,
        plan: Plan | None = None,
    ) -> None:
        self.plan = plan
        self.manifest, self.image_dim, self.tokenizer, self.parts = manifest, image_dim, tokenizer, parts
        self.settings, self.how, self.device, self.report = settings, how, how.device, report
        self.clock = Clock(how.device)
        self._expert = ""  # of the last step
        self._told: tuple[WanTransformer, list[Context]] | None = None  # by that expert
        if settings.sampler == "rcm":
            self.times = rcm.timesteps(settings.num_steps, settings.sigma_max)
        else:
            self.times = flow.timesteps(settings.num_steps, settings.shift)
        if settings.noise_device == "cuda" and not torch.cuda.is_available():
            raise MachineError("noise_device 'cuda' needs a CUDA device; this machine has none (use 'cpu')")

    def _part(self, role: str) -> Any:
        wanted = self._wanted(role, self._loading)
        if self.parts.has(role, wanted[0]):
            return self.parts.get(role, *wanted)
        with self.clock.stage("load"):
            return self.parts.get(role, *wanted)

    def _loading(self, done: int, total: int) -> None:
        self.report(Progress("load", done, total, "bytes"))

    def _wanted(
        self, role: str, report: Report | None = None
    ) -> tuple[Hashable, Callable[[], Any], Callable[[Any], Any]]:
        """A part's variant, how to load it, and what its blocks then need where they are lent from the host."""
        hosted, place = self.parts.is_hosted(role), self.parts.place(role)
        format = self.how.linears[role].format if role in self.how.linears else None
        prepared = None if format is None else partial(prepare_block, linears=format, dtype=self.how.dtype)

        def load() -> Any:
            ready: dict[str, Any] = {} if prepared is None or hosted else {"each_block": prepared}
            path, device = self.manifest.files[role], self.parts.loads_to(role)
            return LOADERS[role](path, device, self.how.dtype, report=report, **ready)

        def ready(part: Any) -> Callable[[nn.Module], None] | None:
            changes = format in FORMATS and format != file_format(part)
            joins = self.device.type == "cuda" and place.home == "host"  # a part on disk stays in its mapped file
            return prepared if changes or joins else None

        return self.how.variant(role), load, ready

    def begin_loading(self) -> None:
        """The transformers, in the background, in the order they are wanted; where the plan has room for that."""
        if self.plan is not None and self.plan.early:
            for role in (role for role in TRANSFORMERS if role in self.manifest.files):
                if self.parts.place(role).home != "disk":
                    self.parts.start(role, *self._wanted(role))

    def finish_loading(self) -> None:
        """Wait for that, unless the device has room for what loading takes there beside the next stages."""
        if self.plan is not None and not self.plan.longer and self.parts.is_loading:
            with self.clock.stage("load"):
                self.parts.settle()

    def encode_text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Embeddings [B, L, D] of the prompts and, with guidance, of the negative prompt as often.

        Each prompt is read alone, in its own length, so that what it gives depends on nothing else; prompts read
        before, by the same file and in the same dtype, do not need the encoder.
        """
        guided = self.settings.guidance_scale != 1
        distinct = list(dict.fromkeys([*prompts, *([self.settings.negative_prompt] if guided else [])]))
        self.report(Progress("text", 0, 1))
        source = file_identity(self.manifest.files["text_encoder"]), self.how.dtype
        known = {prompt: self.parts.texts.get((prompt, *source)) for prompt in distinct}
        unknown = [prompt for prompt, text in known.items() if text is None]
        texts = {prompt: text.to(self.device) for prompt, text in known.items() if text is not None}
        if unknown:
            encoder = self._part("text_encoder")
            with self.clock.stage("text"):
                ids, mask = self.tokenizer(unknown)
                for prompt, row, length in zip(unknown, ids, mask.sum(dim=1).tolist(), strict=True):
                    texts[prompt] = encoder(row[None, :length].to(self.device))[0]
                for prompt in unknown:
                    self.parts.texts.put((prompt, *source), texts[prompt])
            self.parts.done("text_encoder")
        self.report(Progress("text", 1, 1))
        rows = min(TEXT_LENGTH, 1 + max(map(len, texts.values())))  # the row after a prompt stands for the rest
        whole = {prompt: nn.functional.pad(text, (0, 0, 0, rows - len(text))) for prompt, text in texts.items()}
        wanted = torch.stack([whole[prompt] for prompt in prompts])
        return wanted, whole[self.settings.negative_prompt].expand_as(wanted) if guided else None

    def condition(self, texts: tuple[Tensor, Tensor | None], image: Image | None) -> Condition:
        """Everything the transformer is told, for all samples."""
        settings, n = self.settings, self.settings.num_samples
        if image is None:
            return Condition(*texts, None, None)
        self.report(Progress("condition", 0, 1))
        tokens = None
        if self.image_dim is not None:
            image_encoder = self._part("image_encoder")
            with self.clock.stage("condition"):
                whole = to_tensor(image, image.height, image.width)
                tokens = image_encoder(whole.to(self.device)).expand(n, -1, -1)
            self.parts.done("image_encoder")
        vae = self._part("vae")
        with self.clock.stage("condition"):
            first = to_tensor(image, settings.height, settings.width).to(self.device)
            budget = None if self.plan is None else self.plan.encode_budget
            encoded = vae.encode_first_frame(first, settings.num_frames, budget)
            known = image_condition(encoded).expand(n, -1, -1, -1, -1)
        self.parts.done("vae")
        self.report(Progress("condition", 1, 1))
        return Condition(*texts, known, tokens)

    def denoise(self, condition: Condition, preview: PreviewCallback | None = None) -> Tensor:
        """The final latent, float32 [B, 16, T, h, w]."""
        settings = self.settings
        shape = (
            settings.num_samples, LATENT_CHANNELS, latent_frames(settings.num_frames),
            settings.height // SPATIAL_FACTOR, settings.width // SPATIAL_FACTOR,
        )  # fmt: skip
        velocity = self._velocity_function(condition)
        if preview is not None:
            velocity = self._previewed(velocity, preview)

        def on_step(i: int, latent: Tensor, t: float) -> None:
            self.report(Progress("denoise", i + 1, settings.num_steps))

        self.report(Progress("denoise", 0, settings.num_steps))
        with self.clock.stage("denoise"):
            if settings.sampler == "rcm":
                noises = self._noises(shape, 1 if settings.ode else settings.num_steps)
                latent = rcm.sample(velocity, noises, self.times, settings.ode, on_step)
            else:
                latent = flow.sample(velocity, self._noises(shape, 1)[0], self.times, settings.sampler, on_step)
        self._told = None
        for name in self.manifest.experts:
            self.parts.done(_ROLE_OF[name])
        return latent

    def _noises(self, shape: Sequence[int], count: int) -> list[Tensor]:
        """Standard normal tensors, one draw each from one generator, on the engine's device."""
        drawn = noise.draw(shape, count, self.settings.seed, self.settings.noise_device)
        return [each.to(self.device) for each in drawn]

    def _velocity_function(self, condition: Condition) -> rcm.VelocityFunction:
        """The model as samplers see it, with each sampler's own rounding of what the network gets."""
        settings = self.settings

        def velocity(latent: Tensor, t: float, step: int) -> Tensor:
            net = self._transformer(t)
            timestep = torch.tensor(t, dtype=torch.float32) * 1000
            latent, known = latent.float(), condition.image
            if settings.sampler == "rcm":
                latent, timestep, known = rcm.round_inputs(latent, timestep, known)
            elif settings.sampler == "unipc":  # Wan's scheduler has whole timesteps
                timestep = timestep.trunc()
            times = timestep.to(self.device).expand(latent.shape[0])

            told = self._tell(net, condition)
            wanted = net(latent, times, told[0], known)
            if len(told) == 1:
                return wanted
            unwanted = net(latent, times, told[1], known)
            return unwanted + settings.guidance_scale * (wanted - unwanted)

        return velocity

    def _previewed(self, velocity: rcm.VelocityFunction, preview: PreviewCallback) -> rcm.VelocityFunction:
        """The same function, showing what each step takes the clean latent to be."""
        vae = self._part("vae")
        with self.clock.stage("condition"):
            colours = fit_colours(vae.encode)
        self.parts.done("vae")

        def shown(latent: Tensor, t: float, step: int) -> Tensor:
            found = velocity(latent, t, step)
            preview(step + 1, to_colours(latent - t * found, colours))
            return found

        return shown

    def _tell(self, net: WanTransformer, condition: Condition) -> list[Context]:
        """What this expert makes of the prompts and, with guidance, of the negative ones: once for all its steps."""
        if self._told is None or self._told[0] is not net:
            texts = [text for text in (condition.text, condition.empty_text) if text is not None]
            at_once = not self.parts.is_hosted(_ROLE_OF[self._expert])
            self._told = net, [net.tell(text, condition.image_tokens, TEXT_LENGTH, at_once) for text in texts]
        return self._told[1]

    def _transformer(self, t: float) -> WanTransformer:
        name = expert_for(t, self.settings.boundary) if self.manifest.two_experts else "single"
        if (self._expert, name) == ("high", "low"):
            self._told = None  # or it would keep the other expert in memory
            with self.clock.stage("switch"):
                self.parts.done("high_noise")
                net = self._part("low_noise")
        else:
            net = self._part(_ROLE_OF[name])
        self._expert = name
        net.attention, net.norms = self.how.attention, self.how.norms
        return net

    def decode(self, latent: Tensor, sink: FrameSink | None = None) -> list[np.ndarray]:
        """uint8 [T, H, W, 3] per sample; the sink gets them while later ones are decoded."""
        vae, budget = self._part("vae"), None if self.plan is None else self.plan.decode_budget
        settings, videos = self.settings, list[np.ndarray]()
        done, total = 0, settings.num_samples * latent.shape[2]
        self.report(Progress("decode", 0, total))
        together = max(1, DECODE_PIXELS[self.device.type] // (settings.width * settings.height))
        size = settings.num_frames, settings.height, settings.width, 3
        with self.clock.stage("decode"):
            for samples in latent.split(together):
                frames = torch.empty(len(samples), *size, dtype=torch.uint8)
                made = list(frames.numpy())
                for start, stop in to_host(map(to_uint8, vae.decode_stream(samples, budget)), frames):
                    if sink is not None:
                        for i, video in enumerate(made, len(videos)):
                            sink.add(i, video[start:stop])
                    done += len(samples)
                    self.report(Progress("decode", done, total))
                videos += made
        self.parts.done("vae")
        return videos


def image_condition(latent: Tensor) -> Tensor:
    """A first frame's latent [B, 16, T, h, w] with 4 mask channels before it, 1 in that frame: [B, 20, T, h, w]."""
    mask = torch.zeros_like(latent[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, latent], dim=1)


def to_uint8(video: Tensor) -> Tensor:
    """-1..1 (clamped) to bytes: trunc(255 v + 0.5) of v in 0..1, as the official code writes them."""
    return ((video.clamp(-1, 1) + 1) * 0.5 * 255 + 0.5).to(torch.uint8)
