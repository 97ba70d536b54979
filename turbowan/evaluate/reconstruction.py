"""What a VAE keeps of clips it never saw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import CheckpointError, RequestError
from ..models.vae import WanVAE
from ..world.analyse import analyse_shapes, matches, psnr
from ..world.scenes import draw_scenes, render
from .interval import share

GATE = {"psnr": 28.0, "kept": 0.97}  # on whole held-out shape clips; `check_gate` holds a stage to it


@torch.no_grad()
def evaluate_vae(
    vae: WanVAE,
    clips: int,
    frames: int = 33,
    height: int = 160,
    width: int = 256,
    batch: int = 8,
    device: torch.device | str = "cpu",
    camera: bool = False,
) -> dict[str, object]:
    """Encode and decode held-out clips of the full length.

    Args:
        clips: how many.
        frames, height, width: of each clip.
        batch: clips at a time.
        camera: clips of a moving camera over a texture instead of a moving shape.

    Raises:
        RequestError: no clips, or none at a time.

    Returns:
        psnr: in dB, mean over clips. psnr_by_frame: per frame index. kept: share of shape clips in which the analyser
        still finds colour, shape, direction and background as in the scene, all at once.
    """
    if clips < 1 or batch < 1:
        raise RequestError(f"an evaluation takes at least 1 clip, 1 at a time; got {clips}, {batch} at a time")
    generator = torch.Generator().manual_seed(987_654)
    scenes = draw_scenes(clips, generator, 1.0 if camera else 0.0, held_out=None if camera else True)
    errors, kept = [], 0
    for start in range(0, clips, batch):
        part = scenes[slice(start, start + batch)].to(device)
        video = render(part, frames, height, width)
        out = vae.decode(vae.encode(video)).clamp(-1, 1)
        errors.append((out - video).square().mean(dim=(1, 3, 4)).cpu())
        if not camera:
            right = matches(analyse_shapes(out), part)
            kept += int(torch.stack(list(right.values())).all(dim=0).sum())
    mse = torch.cat(errors)
    return {
        "clips": clips,
        "psnr": round(sum(psnr(float(m)) for m in mse.mean(dim=1)) / clips, 2),
        "psnr_by_frame": [round(psnr(float(m)), 2) for m in mse.mean(dim=0)],
        "kept": None if camera else share(kept, clips),
    }


def check_gate(report: Mapping[str, Any], name: str) -> None:
    """Raise CheckpointError unless a VAE is good enough to train a transformer on its latents.

    Args:
        report: what `evaluate_vae` says of shape clips. name: how to call the VAE in the error.
    """
    found = {"psnr": report["psnr"], "kept": report["kept"]["share"]}
    low = [f"{key} {found[key]:.4g} (at least {least:g})" for key, least in GATE.items() if found[key] < least]
    if low:
        raise CheckpointError(f"{name} is not good enough to build on: {', '.join(low)}; train it longer")
