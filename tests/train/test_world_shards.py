"""The procedural world on disk: its clips decode to what was drawn, its captions fit, a stopped run goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbowan.checkpoints import load_text_encoder, load_vae
from turbowan.checkpoints.tokenizer import find_tokenizer
from turbowan.errors import CheckpointError
from turbowan.stages import image_condition
from turbowan.train.shard_source import ShardSource
from turbowan.train.shards import Shards
from turbowan.train.world import WorldConfig, draw_clips
from turbowan.train.world_shards import write_world_shards

CPU = torch.device("cpu")
SMALL = {"frames": 5, "height": 32, "width": 48}


@pytest.fixture
def parts(tiny: Path) -> tuple:
    """VAE, tokenizer and text encoder of the embedded model."""
    words = find_tokenizer(tiny / "text_encoder.safetensors", tiny / "tokenizer")
    return load_vae(tiny / "vae.safetensors"), words, load_text_encoder(tiny / "text_encoder.safetensors")


@pytest.mark.parametrize("image", [False, True])
def test_clips_are_those_of_the_world(
    image: bool, tmp_path: Path, parts: tuple, fresh_seed: int, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    config = WorldConfig(**SMALL, image=image, picture_share=0.25)
    seed = fresh_seed % 1000
    paths = write_world_shards(config, 23, tmp_path, *parts, CPU, seed, 22)
    assert sorted(os.listdir(tmp_path)) == ["negative.pt", *(path.name for path in paths)]
    shards = Shards(paths)
    vae, words, encoder = parts
    for first, count in ((0, 20), (20, 2), (22, 1)):  # what is drawn together: 20, from the start of a shard on
        video, captions = draw_clips(config, 20, seed * 1_000_003 + first, CPU)
        prompts = captions[0][:count]
        assert [shards[first + row].prompt for row in range(count)] == prompts
        with torch.no_grad():
            latents = vae.encode_whole(video[:count])
            images = image_condition(vae.encode_first_frame(video[:count, :, 0], 5)) if image else None
            ids, mask = words(prompts)
            texts = encoder(ids, mask)
        for row in range(count):
            clip = shards[first + row]
            assert relative_error(clip.latent.float(), latents[row]) < 5e-3  # of bfloat16
            assert relative_error(clip.text.float(), texts[row, :32]) < 5e-3
            assert not texts[row, 31:].any()  # so the last row stands for the rest
            assert (clip.condition is None) == (images is None)
            if images is not None:
                assert relative_error(clip.condition.float(), images[row]) < 5e-3
    source = ShardSource(shards, 4, CPU)
    empty = encoder(*words([""]))[:, :32].detach()
    assert relative_error(source.negative, empty) < 5e-3
    assert source.batch(0, range(4)).text.shape == (4, 33, empty.shape[2])  # and a row for the rest of the 512
    source.close()


def test_a_stopped_run_goes_on(tmp_path: Path, parts: tuple) -> None:
    config = WorldConfig(**SMALL)

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_world_shards(config, 9, tmp_path / "a", *parts, CPU, 3, 3, stop)
    assert len(Shards(tmp_path / "a")) == 6
    write_world_shards(config, 9, tmp_path / "a", *parts, CPU, 3, 3)
    write_world_shards(config, 9, tmp_path / "b", *parts, CPU, 3, 3)
    for name in os.listdir(tmp_path / "b"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    other = Shards(write_world_shards(config, 3, tmp_path / "c", *parts, CPU, 4, 3))
    assert not torch.equal(other[0].latent, Shards(tmp_path / "b")[0].latent)


def test_captions_need_their_rows(tmp_path: Path, parts: tuple) -> None:
    with pytest.raises(CheckpointError, match=r"a caption has \d+ tokens; text_rows must be more, it is 6"):
        write_world_shards(WorldConfig(**SMALL, text_rows=6), 9, tmp_path, *parts, CPU)
    assert not list(tmp_path.glob("*.tar"))
