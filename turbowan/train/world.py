"""The procedural world as training data: latents encoded on the fly into a pool on the device.

The pool's oldest clips are replaced as training goes on. Which clips it holds is a function of the step alone, so a run
that is killed and resumed, or goes on with another number of processes, sees what it would have seen.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..models.text_encoder import TextEncoder
from ..models.tokenizer import Tokenizer
from ..models.vae import WanVAE
from ..stages import image_condition
from ..world.captions import camera_captions, caption
from ..world.pictures import draw_pictures, move_camera
from ..world.scenes import CAMERAS, draw_scenes, render
from .config import check_counts, is_number
from .data import Batch, Draws


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Clips and captions. Shares are of all clips; what they leave is of moving shapes."""

    frames: int = 33
    height: int = 160
    width: int = 256
    camera_share: float = 0.15  # a camera over a texture, both named in the caption
    picture_share: float = 0.0  # a camera over any picture; only the camera's way is named
    image: bool = False  # give the first frame as a condition (image-to-video)
    text_rows: int = 32  # longest caption and one empty row
    empty_prompts: float = 0.1
    pool_start: int = 8192  # clips before the first step, in whole refreshes
    pool_size: int = 40960
    refresh_steps: int = 4
    refresh_clips: int = 64
    wordings: int = 4  # captions kept per clip

    def __post_init__(self) -> None:
        counts = ("text_rows", "pool_start", "pool_size", "refresh_steps", "refresh_clips", "wordings")
        check_counts(self, ("frames", "height", "width", *counts))
        if self.frames % 4 != 1 or self.height % 16 or self.width % 16:
            raise CheckpointError(
                "clips have 4 k + 1 frames, and heights and widths that are multiples of 16;"
                f" got {self.frames} of {self.height} x {self.width}"
            )
        shares = (self.camera_share, self.picture_share, self.empty_prompts)
        if not all(is_number(s) and 0 <= s <= 1 for s in shares) or self.camera_share + self.picture_share > 1:
            raise CheckpointError(
                "camera_share, picture_share, their sum and empty_prompts lie in 0..1; got"
                f" {', '.join(map(str, shares))}"
            )
        if self.pool_size < self.refresh_clips:
            raise CheckpointError(
                f"a pool of {self.pool_size} clips has no room for the {self.refresh_clips} of a refresh; raise"
                " pool_size, or lower refresh_clips"
            )


def draw_clips(
    config: WorldConfig, count: int, seed: int, device: torch.device
) -> tuple[Tensor, list[list[str]]]:
    """Draw and render `count` clips: video float32 [B, 3, T, H, W] in -1..1, and for each wording B captions."""
    generator = torch.Generator().manual_seed(seed)
    pictures = round(count * config.picture_share)
    scenes = draw_scenes(count - pictures, generator, config.camera_share / max(1e-6, 1 - config.picture_share))
    clips = [render(scenes.to(device), config.frames, config.height, config.width)]
    camera = torch.randint(len(CAMERAS), (pictures,), generator=generator)
    if pictures:
        amount = torch.rand(pictures, generator=generator).to(device)
        still = draw_pictures(pictures, generator, device, config.height)
        clips.append(move_camera(still, camera.to(device), amount, config.frames, config.height, config.width))
    rng = random.Random(seed)
    captions = [[*caption(scenes, rng), *camera_captions(camera, rng)] for _ in range(config.wordings)]
    return torch.cat(clips), captions


def tokenise(config: WorldConfig, tokenizer: Tokenizer, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [B, text_rows] each; the last row is always empty, for all up to the 512th.

    Raises:
        CheckpointError: a caption leaves no empty row.
    """
    ids, mask = tokenizer(prompts)
    longest = int(mask.sum(dim=1).max())
    if longest >= config.text_rows:
        raise CheckpointError(f"a caption has {longest} tokens; text_rows must be more, it is {config.text_rows}")
    return ids[:, : config.text_rows], mask[:, : config.text_rows]


class Pool:
    """Latents, conditions and tokenised captions of the newest clips.

    Args:
        seed: of the clip with number 0; clip n has seed + n.
    """

    def __init__(self, config: WorldConfig, vae: WanVAE, tokenizer: Tokenizer, device: torch.device, seed: int) -> None:
        self.config, self.vae, self.tokenizer, self.device, self.seed = config, vae, tokenizer, device, seed
        shape = (config.pool_size, 16, (config.frames - 1) // 4 + 1, config.height // 8, config.width // 8)
        self.latents = torch.empty(shape, dtype=vae.dtype, device=device)
        self.images = torch.empty(shape, dtype=vae.dtype, device=device) if config.image else None
        self.ids = torch.zeros(config.pool_size, config.wordings, config.text_rows, dtype=torch.int16)
        self.empty = tokenise(config, tokenizer, [""])[0][0]
        self.made = 0

    def __len__(self) -> int:
        return min(self.made, self.config.pool_size)

    def at_step(self, step: int) -> None:
        """Make the pool what it is at a step: filled, and refreshed as often as the steps before have asked for."""
        config = self.config
        # whole refreshes always: what is drawn depends on how many are drawn together
        wanted = math.ceil(config.pool_start / config.refresh_clips) + step // config.refresh_steps
        if self.made == 0:  # what has been replaced by now need not be made
            kept = math.ceil(config.pool_size / config.refresh_clips)
            self.made = max(0, wanted - kept) * config.refresh_clips
        while self.made < wanted * config.refresh_clips:
            self.add(config.refresh_clips)

    @torch.no_grad()
    def add(self, count: int) -> None:
        """Draw, render and encode `count` clips over the oldest entries."""
        config = self.config
        video, captions = draw_clips(config, count, self.seed + self.made, self.device)
        video = video.to(self.vae.dtype).contiguous(memory_format=torch.channels_last_3d)
        rows = torch.arange(self.made, self.made + count) % config.pool_size
        place = rows.to(self.device)
        self.latents[place] = self.vae.encode_whole(video).to(self.vae.dtype)
        if self.images is not None:
            self.images[place] = self.vae.encode_first_frame(video[:, :, 0], config.frames).to(self.vae.dtype)
        for wording, prompts in enumerate(captions):
            self.ids[rows, wording] = tokenise(config, self.tokenizer, prompts)[0].to(torch.int16)
        self.made += count

    def rows(self, clip: Tensor, wording: Tensor, empty: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Latents [B, 16, T, h, w], token ids [B, L] and condition [B, 20, T, h, w], by uniform numbers in 0..1.

        Args:
            clip, wording: [B], which clip of the pool and which of its captions. empty: [B], below the share of empty
                prompts: none.
        """
        place = (clip * len(self)).long()
        ids = self.ids[place, (wording * self.config.wordings).long()].long()
        ids[empty < self.config.empty_prompts] = self.empty
        place = place.to(self.device)
        condition = None if self.images is None else image_condition(self.images[place].float())
        return self.latents[place].float(), ids.to(self.device, non_blocking=True), condition


class World:
    """The procedural world as a `Source`, with texts from a finished encoder.

    Args:
        encoder: umT5 of the model, on the device. seed: of clips and of the order.
    """

    def __init__(
        self,
        config: WorldConfig,
        vae: WanVAE,
        tokenizer: Tokenizer,
        encoder: TextEncoder,
        device: torch.device,
        seed: int,
    ) -> None:
        self.pool = Pool(config, vae, tokenizer, device, seed * 1_000_003)
        self.encoder, self.seed = encoder.eval().requires_grad_(False), seed
        self.text_dim, self.condition_channels = encoder.width, 20 if config.image else 0
        self.negative = self._encode(self.pool.empty[None].to(device))

    @torch.no_grad()
    def _encode(self, ids: Tensor) -> Tensor:
        return self.encoder(ids, (ids != 0).long()).float()

    def batch(self, step: int, rows: range) -> Batch:
        self.pool.at_step(step)
        draws = Draws(self.seed + 1, step, rows, torch.device("cpu"))
        latents, ids, condition = self.pool.rows(draws.uniform(), draws.uniform(), draws.uniform())
        return Batch(latents, self._encode(ids), condition)
