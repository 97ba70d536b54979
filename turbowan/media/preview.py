"""What a latent will look like, without decoding it: colours as a linear function of its channels, at an eighth of the
size and a quarter of the frames."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .terminal_picture import TerminalPicture

FPS = 4  # of 16, one in four
SCALE = 2  # of the file
PICTURES, SIZE = 32, 32  # to fit to: of so many pixels each way
RIDGE = 1e-3  # in units of a latent's variance; 1e-4 to 1e-2 make no difference
PREVIEW_SUFFIX = ".preview.gif"


def fit_colours(encode: Callable[[Tensor], Tensor]) -> Tensor:
    """The linear map from latent to colour that serves a VAE best, over patches of colour with edges, slopes and grain.

    On clips of the procedural world and pictures of dead leaves, through the embedded VAE, the map is 19 and 24 dB from
    the frames' own averages over 8 x 8 pixels; fitted to flat colours it was 17 and 20.

    Args:
        encode: of the VAE: [B, 3, 1, H, W] in -1..1 to latents [B, C, 1, H/8, W/8].

    Returns:
        float32 [C + 1, 3] on the CPU: a row of red, green and blue per channel, the last for what is always added.
    """
    generator = torch.Generator().manual_seed(0)
    pictures = []
    for i in range(PICTURES):
        cells = torch.rand(1, 3, 1 + i % 4, 1 + i % 4, generator=generator)
        colours = F.interpolate(cells, (SIZE, SIZE), mode="nearest" if i % 8 < 4 else "bilinear")
        grain = 0.08 * torch.rand(1, generator=generator) * torch.randn(colours.shape, generator=generator)
        pictures.append((colours + grain).clamp(0, 1) * 2 - 1)
    seen = torch.cat(pictures)
    latent = encode(seen.unsqueeze(2)).cpu()
    factor = SIZE // latent.shape[-1]
    given = latent.movedim(1, -1).flatten(0, -2).double()
    given = torch.cat([given, torch.ones(len(given), 1)], dim=1)
    wanted = F.avg_pool2d(seen, factor).movedim(1, -1).flatten(0, -2).double()
    damping = RIDGE * len(given) * torch.eye(given.shape[1])
    return torch.linalg.solve(given.T @ given + damping, given.T @ wanted).float()


def to_colours(latent: Tensor, colours: Tensor) -> np.ndarray:
    """Latent [B, C, T, h, w] to uint8 [B, T, h, w, 3] by the map of `fit_colours`."""
    weight, constant = colours.to(latent.device).split([latent.shape[1], 1])
    video = torch.einsum("bcthw,cd->bthwd", latent.float(), weight) + constant[0]
    return ((video.clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8).cpu().numpy()


class PreviewFile:
    """Shows each step's estimate as a small animated picture beside the video to be, and in a terminal that can.

    Args:
        path: of the video: `out/cat.mp4` has its preview in `out/cat.preview.gif`, replaced at each step.
        terminal: where to draw, too.

    Raises:
        MediaError: the file cannot be written.
    """

    def __init__(self, path: Path, terminal: TerminalPicture | None = None) -> None:
        self.path = path.with_name(path.stem + PREVIEW_SUFFIX)
        self._terminal = terminal
        from .video import check_target  # PyAV is wanted where files are written only

        check_target(self.path)

    def __call__(self, step: int, frames: np.ndarray) -> None:
        """After a step (from 1) the estimate of all samples, uint8 [B, T, h, w, 3]."""
        from .video import write_video

        beside = np.concatenate(list(frames), axis=2)
        height, width = beside.shape[1:3]
        large = [Image.fromarray(x).resize((SCALE * width, SCALE * height), Image.Resampling.BICUBIC) for x in beside]
        write_video(self.path, np.stack([np.asarray(picture) for picture in large]), FPS)
        if self._terminal is not None:
            length = len(frames[0])
            few = dict.fromkeys((0, length // 2, length - 1))
            self._terminal.show(np.concatenate([frames[0][i] for i in few], axis=1), again=step > 1)
