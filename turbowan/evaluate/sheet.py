"""A picture to look at: the first prompts down, the cases across."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..media.image import contact_sheet

ROWS = 24
FRAMES = 4  # of each clip
WIDTH = 112  # of a frame, in pixels


class Sheet:
    """Some frames of the first `ROWS` clips of each column, with a mark and a line of text under each."""

    def __init__(self) -> None:
        self._clips: dict[str, list[np.ndarray]] = {}
        self._labels: dict[str, list[str]] = {}

    def add(self, column: str, texts: Sequence[str], videos: Tensor, right: Tensor | None = None) -> None:
        """Add a batch to a column, until it is full.

        Args:
            texts: the prompts. videos: uint8 [B, 3, T, H, W]. right: bool [B]; + or - before the label.
        """
        clips, labels = self._clips.setdefault(column, []), self._labels.setdefault(column, [])
        room = min(len(videos), ROWS - len(clips))
        if room < 1:
            return
        frames = torch.linspace(0, videos.shape[2] - 1, FRAMES).round().long().to(videos.device)
        clips += list(videos[:room, :, frames].permute(0, 2, 3, 4, 1).cpu().numpy())
        marks = [""] * room if right is None else ["+ " if ok else "- " for ok in right[:room].tolist()]
        prompts = texts[:room] if column == next(iter(self._clips)) else [""] * room
        labels += [f"{mark}{column}{': ' * bool(text)}{text}" for mark, text in zip(marks, prompts, strict=True)]

    def draw(self) -> Image.Image:
        """A row for each prompt, a column for each case; a single case goes on in four columns."""
        if len(self._clips) == 1:
            (only,), (its_labels,) = self._clips.values(), self._labels.values()
            return contact_sheet(only, its_labels, 4, FRAMES, WIDTH)
        rows = zip(*self._clips.values(), strict=True)
        labels_by_row = zip(*self._labels.values(), strict=True)
        clips, labels = [clip for row in rows for clip in row], [label for row in labels_by_row for label in row]
        return contact_sheet(clips, labels, len(self._clips), FRAMES, WIDTH)
