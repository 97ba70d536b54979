"""Training of a narrow Wan VAE on the procedural world.

The network starts as a per-frame autoencoder: convolutions see the current frame only, residual branches add nothing.
Time is then learned on top, so that late frames of a clip are never worse than early ones for want of training
(weights trained on short clips drift over long ones).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.vae import (
    LATENT_CHANNELS,
    LATENT_MEAN,
    LATENT_STD,
    CausalConv3d,
    Clip,
    FrameAttention,
    Residual,
    SpatioTemporalDown,
    SpatioTemporalUp,
    WanVAE,
)
from ..ops.registry import compile_eager
from ..world.analyse import psnr
from ..world.scenes import draw_scenes, render, render_collage
from .config import check_positive
from .distributed import rank
from .ema import ExponentialAverage
from .loop import Schedule, Stage, clip_and_step, every


@dataclass(frozen=True)
class Phase:
    """Clips of one size, until a share of the stage is done. Smaller clips are cut out of the full frame."""

    until: float
    frames: int
    height: int
    width: int
    batch: int


@dataclass(frozen=True)
class VAEConfig:
    """One stage. Sizes in pixels, time in minutes of the whole stage."""

    minutes: float
    phases: tuple[Phase, ...]
    dim: int = 16
    frames: int = 33
    height: int = 160
    width: int = 256
    camera_share: float = 0.25
    collage_share: float = 0.2
    lr: float = 1e-3
    kl_weight: float = 1e-4
    edge_weight: float = 0.5
    ema: float = 0.998
    seed: int = 0

    def __post_init__(self) -> None:
        phases = tuple(Phase(**p) if isinstance(p, dict) else p for p in self.phases)
        object.__setattr__(self, "phases", phases)
        check_positive(self, ("minutes", "dim", "lr"))
        if not phases or phases[-1].until < 1:
            raise CheckpointError("the phases must end with one that lasts until 1.0")


@torch.no_grad()
def initialise(vae: WanVAE) -> None:
    """Start as a per-frame autoencoder with idle residual branches."""
    for module in vae.modules():
        if isinstance(module, CausalConv3d) and module.lookback:
            module.weight[:, :, -1] *= 3**0.5
            module.weight[:, :, :-1] = 0
        elif isinstance(module, SpatioTemporalDown):
            channels = module.time_conv.in_channels
            module.time_conv.weight.mul_(0.5)
            module.time_conv.weight[:, :, 1:, 0, 0] += 0.5 * torch.eye(channels).unsqueeze(-1)
        elif isinstance(module, SpatioTemporalUp):
            channels = module.time_conv.in_channels
            module.time_conv.weight.mul_(0.5)
            module.time_conv.weight[:, :, 2, 0, 0] += torch.eye(channels).repeat(2, 1)
    for module in vae.modules():
        if isinstance(module, Residual):
            last: Any = module.residual["6"]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        elif isinstance(module, FrameAttention):
            nn.init.zeros_(module.proj.weight)


def channels_last(vae: WanVAE) -> None:
    """Lay the convolutions' weights out as Hopper's kernels read them; a module-wide switch takes one rank only."""
    for parameter in vae.parameters():
        if parameter.ndim > 3:
            layout = torch.channels_last_3d if parameter.ndim == 5 else torch.channels_last
            parameter.data = parameter.data.contiguous(memory_format=layout)


def draw_clips(config: VAEConfig, phase: Phase, generator: torch.Generator, device: torch.device) -> Tensor:
    """A batch of training clips, float32 [B, 3, T, H, W] in -1..1."""

    def below(high: int) -> int:
        return int(torch.randint(high + 1, (), generator=generator))

    start = below(config.frames - phase.frames)
    frames = slice(start, start + phase.frames)
    window = (below(config.height - phase.height), below(config.width - phase.width), phase.height, phase.width)
    collages = round(phase.batch * config.collage_share)
    scenes = draw_scenes(phase.batch - collages, generator, config.camera_share).to(device)
    clips = render(scenes, config.frames, config.height, config.width, window, frames)
    collage = render_collage(collages, phase.frames, phase.height, phase.width, generator, device)
    return torch.cat([clips, collage])


def loss_terms(vae: WanVAE, clips: Tensor) -> dict[str, Tensor]:
    """Reconstruction and KL of one batch, on a sampled latent: l1, mse, edge (differences in x, y and time), kl."""
    encoded = vae.conv1(vae.encoder(clips, Clip()), Clip()).float()
    mean, log_variance = encoded.chunk(2, dim=1)
    log_variance = log_variance.clamp(-20, 10)
    latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    out = vae.decoder(vae.conv2(latent.to(clips.dtype), Clip()), Clip()).float()
    difference = out - clips.float()
    edges = [difference.diff(dim=d).abs().mean() for d in (2, 3, 4) if difference.shape[d] > 1]
    first = difference[:, :, 0].abs().mean()  # counts once more: it is one frame of many, and the one people give
    return {
        "l1": difference.abs().mean() + 0.1 * first,
        "mse": difference.square().mean(),
        "edge": torch.stack(edges).mean(),
        "kl": 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(),
    }


def train_vae(config: VAEConfig, folder: Path, device: torch.device, max_minutes: float | None = None) -> WanVAE:
    """Train for the stage's minutes, or this run's share of them; returns the averaged weights.

    Args:
        folder: keeps state and curve; a run in the same folder goes on from them, one of a stage that is done only
            loads its result.
        max_minutes: of this run; the whole stage has `config.minutes` of one GPU.

    Raises:
        CheckpointError: `folder` cannot be made, or holds another stage's state.
    """
    torch.manual_seed(config.seed)
    vae = WanVAE(config.dim).to(device)
    initialise(vae.cpu())
    vae.to(device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        channels_last(vae)
        compile_eager("channel_norm")
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=on_gpu)
    average = ExponentialAverage(vae, config.ema)
    stage = Stage(folder, config.minutes, max_minutes, {"vae": vae, "optimizer": optimizer, "average": average}, device)
    schedule = Schedule(config.lr)
    log_due, save_due = every(10), every(120)
    layout = torch.channels_last_3d if on_gpu else torch.contiguous_format
    while stage.running:
        phase = next(p for p in config.phases if stage.progress <= p.until)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + stage.step + 500_009 * rank())
        clips = draw_clips(config, phase, generator, device).contiguous(memory_format=layout)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            terms = loss_terms(vae, clips)
        loss = terms["l1"] + terms["mse"] + config.edge_weight * terms["edge"] + config.kl_weight * terms["kl"]
        loss.backward()
        norm = clip_and_step([optimizer], parameters, schedule.at(stage.progress), 1.0)
        average.update(stage.step)
        stage.step += 1
        if log_due():
            stage.log(
                frames=phase.frames,
                psnr=psnr(terms["mse"].item()),
                norm=norm.item(),
                **{name: value.item() for name, value in terms.items()},
            )
        if save_due():
            stage.save()
    stage.save()
    average.swap()
    return vae.eval()


def statistics_clips(config: VAEConfig, device: torch.device, batches: int = 24, batch: int = 8) -> list[Tensor]:
    """Whole training clips, shapes and cameras as the transformer will see them, to measure the latents on."""
    generator = torch.Generator().manual_seed(config.seed + 555)
    drawn = [draw_scenes(batch, generator, camera_share=0.15).to(device) for _ in range(batches)]
    return [render(scenes, config.frames, config.height, config.width) for scenes in drawn]


@torch.no_grad()
def fold_statistics(vae: WanVAE, clips: list[Tensor]) -> None:
    """Rescale the convolutions around the latent so that Wan's own mean and deviation normalise it.

    Args:
        clips: batches [B, 3, T, H, W] to measure on.
    """
    latents = torch.cat([_raw_latent(vae, batch).transpose(0, 1).flatten(1) for batch in clips], dim=1)
    mean, std = latents.mean(dim=1), latents.std(dim=1)
    wan_mean, wan_std = (torch.tensor(x, device=mean.device) for x in (LATENT_MEAN, LATENT_STD))
    scale = wan_std / std
    n = LATENT_CHANNELS
    bias_in, bias_out = vae.conv1.bias, vae.conv2.bias
    assert bias_in is not None
    assert bias_out is not None
    bias_out += vae.conv2.weight.flatten(1) @ (mean - wan_mean / scale)
    vae.conv2.weight *= (1 / scale).view(1, -1, 1, 1, 1)
    vae.conv1.weight[:n] *= scale.view(-1, 1, 1, 1, 1)
    bias_in[:n] = (bias_in[:n] - mean) * scale + wan_mean
    bias_in[n:] += 2 * scale.log()  # the log variance of the same latent


def _raw_latent(vae: WanVAE, clips: Tensor) -> Tensor:
    return vae.conv1(vae.encoder(clips.to(vae.dtype), Clip()), Clip())[:, :LATENT_CHANNELS].float()
