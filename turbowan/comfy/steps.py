"""The engine's steps on ComfyUI's models: conditions, patches and loading stay ComfyUI's, the arithmetic is ours."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.tokenizer import TEXT_LENGTH
from ..sampling import noise, rcm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Expert:
    """A MODEL and how many steps it takes."""

    model: Any
    steps: int


class RcmSteps(comfy.samplers.Sampler):
    """A ComfyUI SAMPLER that takes some steps of the grid.

    times: float64, from the first step's time to the one reached. noises: as of `rcm.sample`, from the first step on.
    start: the latent (normalised) to go on from; None starts from noise. latent: afterwards, where it came to.
    """

    def __init__(self, times: Tensor, noises: Sequence[Tensor], ode: bool, start: Tensor | None) -> None:
        self.times, self.noises, self.ode, self.latent = times, noises, ode, start

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        clean: list[Tensor] = []

        def velocity(latent: Tensor, t: float, step: int) -> Tensor:
            x = latent.float()
            denoised = model_wrap(x, x.new_full((len(x),), t), **extra_args)
            clean[:] = [denoised]
            return (x.double() - denoised.double()) / t

        def on_step(i: int, latent: Tensor, t: float) -> None:
            if callback is not None:
                callback(i, clean[0], latent.float(), len(self.times) - 1)

        noises = [each.to(noise.device) for each in self.noises]
        start = None if self.latent is None else self.latent.to(noise.device)
        self.latent = rcm.sample(velocity, noises, self.times, self.ode, on_step, start)
        return self.latent


def denoise(experts: Sequence[Expert], text: Any, shape: Sequence[int], times: Tensor, seed: int, ode: bool) -> Tensor:
    """All steps, one expert after the other, each loaded right before its own.

    Args:
        experts: those without steps are never loaded. text: CONDITIONING, of any number of rows. shape: of the latent.
        times: float64 [N + 1], falling to 0.

    Returns:
        LATENT's samples: float32 [B, 16, T, h, w], un-normalised.
    """
    text = text_rows(text)
    working = [expert for expert in experts if expert.steps]
    ends = list(accumulate(expert.steps for expert in working))
    noises = noise.draw(shape, 1 if ode else len(times) - 1, seed, noise_device())
    show = latent_preview.prepare_callback(working[0].model, len(times) - 1)
    latent, samples = None, None
    for expert, end in zip(working, ends, strict=True):
        first = end - expert.steps
        sampler = RcmSteps(times[first : end + 1], noises[0 if ode else first :], ode, latent)
        guider = comfy.samplers.CFGGuider(expert.model)
        guider.set_conds(text, text)
        guider.set_cfg(1.0)

        def on_step(i: int, x0: Tensor, x: Tensor, _: int, first: int = first) -> None:
            show(first + i, x0, x, len(times) - 1)

        sigmas = times[first : end + 1].float()
        empty = torch.zeros(tuple(shape))
        quiet = not comfy.utils.PROGRESS_BAR_ENABLED
        samples = guider.sample(noises[0].float(), empty, sampler, sigmas, None, on_step, quiet, seed)
        latent = sampler.latent
    assert samples is not None
    return samples.to(comfy.model_management.intermediate_device())


_told = False


def noise_device() -> str:
    """CUDA where there is one, as the published nodes drew their noise; else the CPU, which is said once."""
    global _told
    if torch.cuda.is_available():
        return "cuda"
    if not _told:
        _told = True
        log.warning("turbowan: without CUDA noise is drawn on the CPU; a seed gives another video than on CUDA")
    return "cpu"


def text_rows(conditioning: Any) -> list:
    """CONDITIONING with its texts cut or padded with zeros to the 512 rows that Wan was trained with."""
    return [[F.pad(text, (0, 0, 0, TEXT_LENGTH - text.shape[1])), values] for text, values in conditioning]
