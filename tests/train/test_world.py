"""The procedural world as training data: batches by step alone, captions and first frames of their own clips."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor

from turbowan.checkpoints import load_text_encoder, load_vae
from turbowan.checkpoints.tokenizer import find_tokenizer
from turbowan.engine import EMBEDDED
from turbowan.errors import CheckpointError
from turbowan.media.image import to_tensor
from turbowan.stages import image_condition
from turbowan.train.data import Batch
from turbowan.train.world import Pool, World, WorldConfig, draw_clips
from turbowan.world.captions import caption
from turbowan.world.scenes import draw_scenes, render

TINY = EMBEDDED / "tiny"
CPU = torch.device("cpu")
SMALL = {
    "frames": 5, "height": 32, "width": 48, "pool_start": 8, "pool_size": 12, "refresh_clips": 4, "refresh_steps": 3,
    "wordings": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> tuple:
    """VAE, tokenizer and text encoder of the embedded model."""
    words = find_tokenizer(TINY / "text_encoder.safetensors", TINY / "tokenizer")
    return load_vae(TINY / "vae.safetensors"), words, load_text_encoder(TINY / "text_encoder.safetensors")


def same(ours: Batch, theirs: Batch) -> bool:
    assert (ours.condition is None) == (theirs.condition is None)
    images = ours.condition is None or torch.equal(ours.condition, theirs.condition)
    return torch.equal(ours.latents, theirs.latents) and torch.equal(ours.text, theirs.text) and images


@pytest.mark.parametrize("sizes", [{}, {"pool_start": 6, "pool_size": 10, "image": True}], ids=["even", "uneven"])
def test_a_resumed_world_is_the_unbroken_one(sizes: dict, parts: tuple, fresh_seed: int) -> None:
    """Before and after the pool is full, goes round, and drops clips that a late start never makes."""
    config, seed = WorldConfig(**{**SMALL, **sizes}), fresh_seed % 1000
    unbroken = World(config, *parts, CPU, seed)
    batches = [unbroken.batch(step, range(6)) for step in range(20)]
    assert unbroken.pool.made == 8 + 4 * 6
    for step in (2, 3, 8, 19):
        resumed = World(config, *parts, CPU, seed)
        assert same(resumed.batch(step, range(6)), batches[step]), step
    assert not same(World(config, *parts, CPU, seed + 1).batch(2, range(6)), batches[2])
    assert not torch.equal(batches[0].latents, batches[1].latents)


def test_halves_of_the_rows_are_the_whole(parts: tuple, fresh_seed: int) -> None:
    """As two processes take them."""
    config = WorldConfig(**SMALL, image=True, empty_prompts=0.3)
    one, other = (World(config, *parts, CPU, fresh_seed % 1000) for _ in range(2))
    whole = one.batch(7, range(8))
    halves = [other.batch(7, rows) for rows in (range(4), range(4, 8))]
    assert torch.equal(torch.cat([half.latents for half in halves]), whole.latents)
    assert torch.equal(torch.cat([half.condition for half in halves]), whole.condition)
    assert torch.allclose(torch.cat([half.text for half in halves]), whole.text, atol=1e-5)


def test_rows_belong_together(
    parts: tuple, fresh_seed: int, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    """Each row's latent, caption and first frame are of one clip; the engine makes the same condition of the frame."""
    config, seed = WorldConfig(**SMALL, image=True, picture_share=0.5, empty_prompts=0.0), fresh_seed % 1000
    vae, words, encoder = parts
    batch = World(config, *parts, CPU, seed).batch(0, range(20))
    first = seed * 1_000_003
    drawn = [draw_clips(config, 4, first + start, CPU) for start in (0, 4)]
    clips = torch.cat([video for video, _ in drawn])
    captions = [[texts[row] for texts in captions] for _, captions in drawn for row in range(4)]
    with torch.no_grad():
        latents, seen = vae.encode(clips), set()
        for row in range(20):
            place = int((latents - batch.latents[row]).abs().flatten(1).amax(dim=1).argmin())
            seen.add(place)
            assert torch.allclose(latents[place], batch.latents[row], atol=1e-4)
            picture = Image.fromarray(((clips[place, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
            known = image_condition(vae.encode_first_frame(to_tensor(picture, 32, 48), 5))[0]
            assert torch.equal(known[:4], batch.condition[row, :4])
            assert relative_error(batch.condition[row], known) < 0.03  # of the picture's 8 bits
            ids, mask = words(captions[place])
            texts = encoder(ids, mask)[:, :32]
            assert (texts - batch.text[row]).abs().flatten(1).amax(dim=1).min() < 1e-4
    assert min(seen) < 4 <= max(seen)


def test_shares_of_the_clips(fresh_seed: int) -> None:
    """The share of pictures is exact in each draw, that of textures is of all clips; the first ones are scenes."""
    config = WorldConfig(frames=5, height=32, width=48, camera_share=0.3, picture_share=0.4, wordings=3)
    seed = fresh_seed % 1000
    video, captions = draw_clips(config, 20, seed, CPU)
    assert video.shape == (20, 3, 5, 32, 48)
    assert [len(texts) for texts in captions] == [20, 20, 20]
    assert len({tuple(texts) for texts in captions}) == 3  # wordings differ
    scenes = draw_scenes(12, torch.Generator().manual_seed(seed), 0.5)
    assert torch.equal(video[:12], render(scenes, 5, 32, 48))
    assert captions[0][:12] == caption(scenes, random.Random(seed))
    only = WorldConfig(frames=5, height=32, width=48, camera_share=0.0, picture_share=1.0)
    assert draw_clips(only, 3, seed, CPU)[0].shape == (3, 3, 5, 32, 48)


def test_empty_prompts_have_their_share(parts: tuple, fresh_seed: int) -> None:
    world = World(WorldConfig(**SMALL, empty_prompts=0.25), *parts, CPU, fresh_seed % 1000)
    empty = (world.batch(0, range(400)).text - world.negative).abs().flatten(1).amax(dim=1) < 1e-4
    assert empty.float().mean().item() == pytest.approx(0.25, abs=0.09)
    assert torch.equal(world.negative, parts[2](*(x[:, :32] for x in parts[1]([""]))).detach())


def test_the_pool_replaces_its_oldest(parts: tuple) -> None:
    vae, words, _ = parts
    pool = Pool(WorldConfig(**SMALL), vae, words, CPU, seed=4)
    pool.add(8)
    first = pool.latents.clone()
    pool.add(8)
    assert (len(pool), pool.made) == (12, 16)
    assert not torch.equal(pool.latents[:4], first[:4])
    assert torch.equal(pool.latents[4:8], first[4:8])
    last, *_ = pool.rows(torch.tensor([0.999]), torch.tensor([0.0]), torch.tensor([1.0]))
    assert torch.equal(last[0], pool.latents[11])


def test_a_caption_that_is_cut_is_an_error(parts: tuple) -> None:
    world = World(WorldConfig(**SMALL, text_rows=6), *parts, CPU, 0)
    with pytest.raises(CheckpointError, match=r"a caption has \d+ tokens; text_rows must be more, it is 6"):
        world.batch(0, range(2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"frames": 10}, "clips have 4 k + 1 frames, and heights and widths that are multiples of 16; got 10 of 160"),
        ({"width": 100}, "got 33 of 160 x 100"),
        ({"picture_share": 0.9}, "lie in 0..1; got 0.15, 0.9, 0.1"),
        ({"empty_prompts": 2}, "lie in 0..1; got 0.15, 0.0, 2"),
        ({"pool_size": 32}, "a pool of 32 clips has no room for the 64 of a refresh"),
        ({"pool_start": 0}, "pool_start must be a positive number, got 0"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings: dict, said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        WorldConfig(**settings)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
