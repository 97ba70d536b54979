"""A case made ready to run: prompts, noise and first pictures in, latents and videos out, whole batches at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..checkpoints import load_vae
from ..checkpoints.load import choose_attention
from ..engine import Engine
from ..errors import RequestError
from ..models.vae import WanVAE
from ..request import GenerateRequest
from ..settings import resolve
from ..stages import DECODE_PIXELS, Condition, Execution, Run, image_condition, to_uint8
from .case import Case


class Players:
    """Where players come from. Cases that share a model and a precision share its weights.

    Args:
        device: "auto", "cpu", "cuda" …
    """

    def __init__(self, device: str = "auto") -> None:
        self._device = device
        self._engines: dict[tuple[str, str], Engine] = {}

    def player(self, case: Case) -> Player:
        """Find the case's files and settle its settings; weights are read when first needed.

        Raises:
            CheckpointError, MachineError, RequestError: as `Engine.load`, or the case does not fit the model.
        """
        key = (case.model, case.request.precision)
        if key not in self._engines:
            self._engines[key] = Engine.load(case.model, device=self._device)
        return Player(case, self._engines[key])

    def in_float32_dense(self, player: Player) -> Player:
        """The player whose latents another one's are measured against: of the model `exact`, all else the same."""
        if player.is_exact:
            return player
        model = player.case.exact
        request = GenerateRequest(prompt="-", attention="original", precision="float32")
        exact = self.player(Case(f"{model} in float32, dense", model, request, model))
        exact.settings = replace(player.settings, attention="original")
        return exact


class Player:
    """One case. size: frames, height and width of its videos."""

    def __init__(self, case: Case, engine: Engine) -> None:
        self.case, self.engine = case, engine
        manifest = engine.manifest
        if engine.config.image_dim is not None:
            raise RequestError(f"{manifest.name} also reads its picture with CLIP, which is not evaluated")
        settings = resolve(case.request, manifest)
        attention = choose_attention(
            engine.config, manifest.name, settings.attention, settings.sla_topk, **engine.blocks
        )
        self.settings = replace(settings, attention=attention.kind)
        self.how = Execution.of(case.request, engine.device, attention, engine.outlines)
        self.size = (settings.num_frames, settings.height, settings.width)

    @property
    def is_exact(self) -> bool:
        """Whether this is float32 and dense already."""
        dense = self.how.dtype == torch.float32 and self.settings.attention == "original"
        return dense and self.case.exact == self.case.model

    def facts(self) -> dict[str, object]:
        """What a reader must know of the case, for JSON."""
        kept = (
            "sampler", "num_steps", "ode", "sigma_max", "shift", "guidance_scale", "boundary", "attention", "sla_topk",
        )  # fmt: skip
        settings = self.settings.as_dict()
        return {
            "model": self.engine.manifest.name,
            **{name: settings[name] for name in kept},
            **self.how.facts(),
            "exact": self.case.exact,
        }

    @torch.inference_mode()
    def latents(self, prompts: Sequence[str], seeds: Sequence[int], pictures: Tensor | None = None) -> Tensor:
        """Final latents, float32 [B, 16, T, h, w].

        Args:
            seeds: of each sample's noise; the same as `turbowan generate --seed` for one video.
            pictures: [B, 3, H, W] in -1..1, the first frames, for image-to-video.
        """
        settings = replace(self.settings, num_samples=len(prompts))
        run = _SeededRun(
            self.engine.manifest, None, self.engine.tokenizer, self.engine.parts, settings, self.how, lambda _: None
        )
        run.seeds = seeds
        texts = run.encode_text(prompts)
        if pictures is None:
            return run.denoise(Condition(*texts, None, None))
        first = self._vae().encode_first_frame(pictures, self.settings.num_frames)
        return run.denoise(Condition(*texts, image_condition(first), None))

    @torch.inference_mode()
    def videos(self, latents: Tensor) -> Tensor:
        """What a user would see of latents: uint8 [B, 3, T, H, W], on the device."""
        together = max(1, DECODE_PIXELS[self.how.device.type] // (self.settings.width * self.settings.height))
        parts = []
        for samples in latents.split(together):
            parts.append(torch.cat([to_uint8(chunk) for chunk in self._vae().decode_stream(samples)], dim=2))
        return torch.cat(parts)

    @torch.inference_mode()
    def reconstruct(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in -1..1 through the VAE and back: uint8 [B, 3, H, W]."""
        return self.videos(self._vae().encode(pictures.unsqueeze(2)))[:, :, 0]

    def _vae(self) -> WanVAE:
        path, how = self.engine.manifest.files["vae"], self.how
        return self.engine.parts.get("vae", how.variant("vae"), lambda: load_vae(path, how.device, how.dtype))


class _SeededRun(Run):
    """A generation whose samples have a seed each, so that their noise does not depend on who is beside them."""

    seeds: Sequence[int] = ()

    def _noises(self, shape: Sequence[int], count: int) -> list[Tensor]:
        streams = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        noises = [torch.stack([torch.randn(shape[1:], generator=stream) for stream in streams]) for _ in range(count)]
        return [noise.to(self.device) for noise in noises]
