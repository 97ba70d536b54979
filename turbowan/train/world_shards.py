"""The procedural world as latent shards: what `train.world` encodes on the fly, kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.files import make_folder, replacing
from ..models.text_encoder import TextEncoder
from ..models.tokenizer import Tokenizer
from ..models.vae import WanVAE
from ..stages import image_condition
from .distributed import rank
from .shard_source import NEGATIVE_FILE
from .shard_writer import write_shards
from .shards import Sample
from .world import WorldConfig, draw_clips, tokenise

_DRAWN = 20  # clips drawn together: the shares of pictures come in steps of a twentieth
_ENCODED = 5  # clips encoded together: 33 x 160 x 256 with a condition then take 3.2 GB in all on a CPU (measured)


def write_world_shards(
    config: WorldConfig,
    count: int,
    folder: Path,
    vae: WanVAE,
    tokenizer: Tokenizer,
    encoder: TextEncoder,
    device: torch.device,
    seed: int = 0,
    per_shard: int = 256,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write `count` clips with their captions and `negative.pt`, the text of an empty prompt; goes on where it stopped.

    Texts have `config.text_rows` rows, whose last one stands for all up to the 512th (official ones have them all).

    Args:
        config: sizes and shares; with `image` each clip has its first frame as a condition.
        vae, encoder: on the device. device: where clips are drawn and encoded.
        seed: of the clips. per_shard, progress: as `write_shards` has them.

    Returns:
        The shards.

    Raises:
        CheckpointError: what `write_shards` raises, or a caption longer than `config.text_rows` allows.
    """

    def make(numbers: range) -> Iterator[Sample]:
        for first in range(numbers.start, numbers.stop, _DRAWN):
            # always as many, however few are left: what is drawn depends on the number
            video, captions = draw_clips(config, _DRAWN, seed * 1_000_003 + first, device)
            wanted = slice(0, numbers.stop - first)
            yield from _samples(video[wanted], captions[0][wanted])

    @torch.no_grad()
    def _samples(video: Tensor, prompts: list[str]) -> list[Sample]:
        texts = _encode(prompts, config, tokenizer, encoder, device)
        samples = []
        for start in range(0, len(prompts), _ENCODED):
            part = video[start : start + _ENCODED].to(vae.dtype).contiguous(memory_format=torch.channels_last_3d)
            latents = vae.encode_whole(part)
            first = image_condition(vae.encode_first_frame(part[:, :, 0], config.frames)) if config.image else None
            for row in range(len(part)):
                number = start + row
                condition = None if first is None else first[row]
                samples.append(Sample(latents[row], texts[number], prompts[number], condition))
        return samples

    make_folder(folder)
    if rank() == 0:
        with replacing(folder / NEGATIVE_FILE) as partial:
            torch.save(_encode([""], config, tokenizer, encoder, device)[0].bfloat16().cpu(), partial)
    return write_shards(make, count, folder, per_shard, progress)


@torch.no_grad()
def _encode(
    prompts: list[str], config: WorldConfig, tokenizer: Tokenizer, encoder: TextEncoder, device: torch.device
) -> Tensor:
    """[B, text_rows, D]; the rows behind a prompt are zero."""
    ids, mask = tokenise(config, tokenizer, prompts)
    return encoder(ids.to(device), mask.to(device))
