"""Flow matching on the procedural world: a Wan transformer and its text encoder, trained together.

x_t = (1 - t) x0 + t noise; the network predicts the velocity noise - x0. Latents are encoded on the fly into a pool on
the device, whose oldest entries are replaced as training goes on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints import load_text_encoder, load_transformer
from ..checkpoints.files import write_tensors
from ..checkpoints.official import write_transformer
from ..checkpoints.wan import write_text_encoder
from ..errors import CheckpointError, MachineError
from ..media.image import contact_sheet
from ..models.text_encoder import TextEncoder
from ..models.tokenizer import TEXT_LENGTH, Tokenizer
from ..models.transformer import TransformerConfig, WanTransformer
from ..models.vae import WanVAE
from ..ops.registry import compile_eager
from ..sampling import flow
from ..world.analyse import analyse_shapes, matches
from ..world.captions import caption
from ..world.scenes import draw_scenes
from .config import check_positive
from .distributed import rank
from .ema import ExponentialAverage
from .loop import Schedule, Stage, clip_and_step, every
from .world import Pool, WorldConfig


@dataclass(frozen=True, kw_only=True)
class FlowConfig(WorldConfig):
    """One stage. Time in minutes of the whole stage."""

    minutes: float
    dim: int = 256
    ffn_dim: int = 768
    layers: int = 6
    text_dim: int = 128
    text_layers: int = 2
    batch: int = 256  # per process
    optimizer: str = "adamw"  # or "muon": that for the blocks' matrices, AdamW for all else
    lr: float = 1e-3
    muon_lr: float = 3.0  # of the learning rate
    weight_decay: float = 0.01
    ema: float = 0.999
    time_mean: float = 0.6  # t = sigmoid(mean + std * normal)
    time_std: float = 1.2
    time_shift: float = 8.0  # t = shift u / (1 + (shift - 1) u), u uniform: most samples at high noise
    shifted_share: float = 0.0  # share of samples whose time is drawn so
    first_frame_weight: float = 1.0  # of the first latent frame in the loss
    order_bias: bool = False  # start the text encoder with heads that look at neighbouring words
    text_lr: float = 1.0  # of the learning rate; 0 keeps the text encoder as it is
    seed: int = 0
    preview_steps: int = 30
    preview_guidance: float = 3.0
    preview_shift: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer not in ("adamw", "muon"):
            raise CheckpointError(f"optimizer must be adamw or muon, got '{self.optimizer}'")
        check_positive(self, ("minutes", "batch", "lr", "layers"))


def draw_times(config: FlowConfig, generator: torch.Generator) -> Tensor:
    """Noise levels of a batch, [B] in 0..1."""
    count = (config.batch,)
    normal = torch.sigmoid(config.time_mean + config.time_std * torch.randn(count, generator=generator))
    u = torch.rand(count, generator=generator)
    shifted = config.time_shift * u / (1 + (config.time_shift - 1) * u)
    return torch.where(torch.rand(count, generator=generator) < config.shifted_share, shifted, normal)


class FlowModel(nn.Module):
    """Transformer and text encoder as one trainable module."""

    def __init__(self, config: FlowConfig, vocabulary: int) -> None:
        super().__init__()
        width = config.text_dim
        self.text_encoder = TextEncoder(vocabulary, width, config.text_layers, width // 64, 64, 2 * width)
        in_dim = 36 if config.image else 16
        self.transformer = WanTransformer(TransformerConfig(config.dim, config.ffn_dim, config.layers, width, in_dim))
        blocks: Any = self.transformer.blocks
        for block in blocks:  # residual branches start idle
            for layer in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.transformer.head.head.weight)

    @torch.no_grad()
    def start_with_word_order(self) -> None:
        """Small content logits, and position biases that make every head look at near words before or after.

        T5's attention is unscaled: content logits grow until position no longer counts, and a caption becomes a bag of
        words in which the colours of thing and background cannot be told apart.
        """
        blocks: Any = self.text_encoder.model.encoder.block
        for depth, block in enumerate(blocks):
            attention = block.layer[0].SelfAttention
            nn.init.normal_(attention.q.weight, std=0.01)
            bias = attention.relative_attention_bias.weight  # [bucket, head]; bucket d: d words before, 16 + d: after
            bias.zero_()
            for distance in range(1, 2 + 3 * depth):
                bias[distance, ::2] = bias[16 + distance, 1::2] = 6.0 - 0.5 * (distance - 1)

    @torch.no_grad()
    def start_from(self, transformer: Path, text_encoder: Path) -> None:
        """Take over finished weights; channels that only this transformer has start without effect.

        Raises:
            CheckpointError: unreadable, or of other sizes.
        """
        parts: tuple[tuple[Path, nn.Module, nn.Module], ...] = (
            (transformer, load_transformer(transformer), self.transformer),
            (text_encoder, load_text_encoder(text_encoder), self.text_encoder),
        )
        for path, source, target in parts:
            state = dict(source.state_dict())
            patch = state.get("patch_embedding.weight")
            if patch is not None:
                missing = self.transformer.patch_embedding.in_features - patch.shape[1]
                state["patch_embedding.weight"] = F.pad(patch, (0, max(0, missing)))  # features: channel, row, column
            try:
                target.load_state_dict(state)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:160]
                raise CheckpointError(f"{path} does not fit the configuration's sizes ({reason})") from error

    def forward(self, latent: Tensor, timestep: Tensor, ids: Tensor, condition: Tensor | None = None) -> Tensor:
        text = self.text_encoder(ids, (ids != 0).long())
        return self.transformer(latent, timestep, text, condition, text_rows=TEXT_LENGTH)


def train_flow(
    config: FlowConfig,
    folder: Path,
    vae: WanVAE,
    tokenizer: Tokenizer,
    vocabulary: int,
    device: torch.device,
    max_minutes: float | None = None,
    init: tuple[Path, Path] | None = None,
) -> FlowModel:
    """Train for the stage's minutes, or this run's share of them; returns the averaged weights.

    Args:
        folder: keeps state and curve; a run in the same folder goes on from them.
        vae: encodes the clips. tokenizer, vocabulary: of the captions, and its number of pieces.
        max_minutes: of this run; the whole stage has `config.minutes` of one GPU.
        init: files of a transformer and a text encoder to start from.

    Raises:
        CheckpointError: `folder` cannot be made, or holds another stage's state, or `init` does not fit.
        MachineError: Muon is asked for and this PyTorch has none.
    """
    torch.manual_seed(config.seed)
    on_gpu = device.type == "cuda"
    model = FlowModel(config, vocabulary)
    if config.order_bias:
        model.start_with_word_order()
    if init is not None:
        model.start_from(*init)
    if config.text_lr == 0:
        model.text_encoder.requires_grad_(False)
    model.to(device)
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        compile_eager("channel_norm")
        for block in model.transformer.blocks:
            block.compile(dynamic=False)
    optimizers = make_optimizers(model, config, fused=on_gpu)
    parameters = [p for p in model.parameters() if p.requires_grad]
    average = ExponentialAverage(model, config.ema)
    parts = {"model": model, "average": average, **optimizers}
    stage = Stage(folder, config.minutes, max_minutes, parts, device)
    begun = stage.step
    torch.manual_seed(config.seed + 7919 * stage.step + rank())
    schedule = Schedule(config.lr)
    pool_seed = config.seed * 1_000_003 + 131_071 * stage.step + 10_000_019 * rank()
    pool = Pool(config, vae, tokenizer, device, pool_seed)
    log_due, save_due = every(10), every(150)
    losses = torch.zeros(3, device=device)  # sum, count, gradient norm
    while stage.running:
        pool.at_step(stage.step - begun)
        generator = torch.Generator().manual_seed(config.seed * 7_368_787 + stage.step + 30_000_023 * rank())
        latent, ids, condition = pool.rows(*torch.rand(3, config.batch, generator=generator))
        t = draw_times(config, generator).to(device)
        noise = torch.randn(latent.shape, device=device)
        weight = t.view(-1, 1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            velocity = model((1 - weight) * latent + weight * noise, 1000 * t, ids, condition)
        error = (velocity - (noise - latent)).square()
        loss = error.mean()
        if config.first_frame_weight != 1:
            loss = loss + (config.first_frame_weight - 1) * error[:, :, 0].mean() / error.shape[2]
        loss.backward()
        norm = clip_and_step(list(optimizers.values()), parameters, schedule.at(stage.progress), 1.0)
        average.update(stage.step)
        losses += torch.stack([loss.detach(), torch.ones_like(norm), norm])
        stage.step += 1
        if log_due():
            total, count, norms = losses.tolist()
            stage.log(loss=total / count, norm=norms / count, pool=len(pool))
            losses.zero_()
        if save_due():
            stage.save()
    stage.save()
    average.swap()
    return model.eval()


def make_optimizers(model: FlowModel, config: FlowConfig, fused: bool) -> dict[str, torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of the transformer's blocks; by name, for the state's file."""
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2] if config.optimizer == "muon" else []
    taken = {id(p) for p in matrices}
    groups = [
        {"params": [p for p in part.parameters() if (p.ndim == 2) == decayed and id(p) not in taken], "scale": scale,
         "weight_decay": config.weight_decay if decayed else 0.0}
        for part, scale in ((model.transformer, 1.0), (model.text_encoder, config.text_lr))
        if scale
        for decayed in (True, False)
    ]  # fmt: skip
    optimizers: dict[str, torch.optim.Optimizer] = {
        "optimizer": torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=fused)
    }
    if matrices:
        if not hasattr(torch.optim, "Muon"):
            raise MachineError(f"PyTorch {torch.__version__} has no Muon; take 2.10 or newer, or optimizer = 'adamw'")
        group = {"params": matrices, "scale": config.muon_lr}
        optimizers["muon"] = torch.optim.Muon(
            [group], lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
    return optimizers


@torch.no_grad()
def preview(
    model: FlowModel,
    config: FlowConfig,
    vae: WanVAE,
    tokenizer: Tokenizer,
    count: int,
    device: torch.device,
    path: Path,
) -> dict[str, float]:
    """Sample held-out prompts, write a sheet of frames, and return the share right on each point and on all."""
    scenes = draw_scenes(count, torch.Generator().manual_seed(123_321), held_out=True)
    prompts = caption(scenes, random.Random(5))
    ids = tokenizer([*prompts, *[""] * count])[0][:, : config.text_rows].to(device)
    shape = (count, 16, (config.frames - 1) // 4 + 1, config.height // 8, config.width // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(device)

    def velocity(latent: Tensor, t: float, step: int) -> Tensor:
        both = latent.float().repeat(2, 1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            wanted, empty = model(both, torch.full((2 * count,), 1000 * t, device=device), ids).chunk(2)
        return empty + config.preview_guidance * (wanted - empty)

    times = flow.timesteps(config.preview_steps, config.preview_shift)
    latent = flow.sample(velocity, noise, times, "unipc")
    video = torch.cat([vae.decode(part).clamp(-1, 1) for part in latent.split(16)])
    right = matches(analyse_shapes(video), scenes.to(device))
    right["all"] = torch.stack(list(right.values())).all(dim=0)
    frames = ((video[:32] + 1) * 127.5 + 0.5).byte().permute(0, 2, 3, 4, 1).cpu().numpy()
    labels = [f"{'+' if ok else '-'} {text}" for ok, text in zip(right["all"].tolist(), prompts, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(list(frames), labels[:32]).save(path)
    return {name: float(value.float().mean()) for name, value in right.items()}


def export(model: FlowModel, folder: Path) -> None:
    """Write `transformer.safetensors` (bfloat16) and `text_encoder.safetensors` in the official key layouts."""
    transformer = {key: _to_file(value) for key, value in model.transformer.state_dict().items()}
    write_tensors(folder / "transformer.safetensors", write_transformer(transformer))
    encoder = model.text_encoder.model.state_dict()
    write_tensors(folder / "text_encoder.safetensors", write_text_encoder({k: _to_file(v) for k, v in encoder.items()}))


def _to_file(value: Tensor) -> Tensor:
    return value.to(torch.bfloat16) if value.is_floating_point() else value
