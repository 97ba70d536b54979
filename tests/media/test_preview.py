"""Previews of latents look like the frames that the VAE makes of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from turbowan.checkpoints import load_vae
from turbowan.engine import EMBEDDED
from turbowan.errors import MediaError
from turbowan.media.preview import PreviewFile, fit_colours, to_colours
from turbowan.media.terminal_picture import TerminalPicture


@torch.inference_mode()
def test_a_preview_has_the_colours_of_the_video(clip, psnr):
    vae = load_vae(EMBEDDED / "tiny" / "vae.safetensors")
    colours = fit_colours(vae.encode)
    assert colours.shape == (17, 3)
    video = torch.from_numpy(clip(9, 96, 160)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    seen = to_colours(vae.encode(video), colours)
    assert (seen.shape, seen.dtype) == ((1, 3, 12, 20, 3), np.uint8)
    small = (F.avg_pool3d(video, (1, 8, 8))[0].permute(1, 2, 3, 0) * 127.5 + 127.5).round().byte().numpy()
    found = psnr(seen[0], small[[0, 3, 7]])
    assert found > 14  # 19 in the mean of many
    assert found > psnr(seen[0], small[[0, 3, 7]].mean(axis=(0, 1, 2)).astype(np.uint8) + np.zeros_like(seen[0]))


def test_a_linear_encoder_is_found_exactly(fresh_seed):
    """Where latents are linear in colour, only the damping is between the map and its inverse."""
    mix = torch.linalg.qr(torch.randn(16, 3))[0]

    def encode(video: torch.Tensor) -> torch.Tensor:
        return torch.einsum("cd,bdthw->bcthw", mix, F.avg_pool3d(video, (1, 8, 8)))

    colour = torch.rand(2, 3, 1, 1, 1) * 2 - 1
    seen = to_colours(encode(colour.expand(-1, -1, 3, 16, 24)), fit_colours(encode))
    assert seen.shape == (2, 3, 2, 3, 3)
    assert np.abs(seen - (colour.flatten(1) + 1).numpy()[:, None, None, None] * 127.5).max() < 3


def test_the_file_is_replaced_at_each_step(tmp_path, files_in):
    rng = np.random.default_rng()
    show = PreviewFile(tmp_path / "out" / "cat.mp4", TerminalPicture(io.StringIO()))
    for step in (1, 2):
        show(step, rng.integers(0, 2, (2, 5, 6, 10, 1), dtype=np.uint8).repeat(3, axis=4) * 255)
        assert files_in(tmp_path) == ["out", "out/cat.preview.gif"]
        with Image.open(tmp_path / "out" / "cat.preview.gif") as gif:
            assert (gif.size, gif.n_frames) == ((2 * 2 * 10, 2 * 6), 5)
    (tmp_path / "dog.preview.gif").mkdir()
    with pytest.raises(MediaError, match=r"dog\.preview\.gif is a folder"):
        PreviewFile(tmp_path / "dog.mp4")
