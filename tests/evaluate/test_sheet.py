"""What is on a sheet, read back from its pixels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from turbowan.evaluate.sheet import FRAMES, ROWS, WIDTH, Sheet

CELL = FRAMES * WIDTH + 6, 70 + 18  # of a 5:8 clip: width, height


def clips(*tones: int) -> Tensor:
    """Clips of one grey each, which brighten by 20 to their ends."""
    start = torch.tensor(tones).view(-1, 1, 1, 1, 1)
    return (start + torch.linspace(0, 20, 9).round().view(1, 1, -1, 1, 1)).to(torch.uint8).expand(-1, 3, 9, 40, 64)


def test_prompts_go_down_and_cases_across() -> None:
    sheet = Sheet()
    for tones, right in (((10, 50), (True, False)), ((90,), (True,))):
        texts = [f"prompt {tone}" for tone in tones]
        sheet.add("given", texts, clips(*tones)[:, :, :1])
        sheet.add("model", texts, clips(*(tone + 100 for tone in tones)), torch.tensor(right))
    image = sheet.draw()
    assert image.size == (2 * CELL[0], 3 * CELL[1])
    pixels = np.asarray(image)
    for row, tone in enumerate((10, 50, 90)):
        y = row * CELL[1] + 30
        assert (pixels[y, 10 : 4 * WIDTH - 10] == tone).all()  # a still picture stays as it is
        assert (pixels[y, CELL[0] + 10] == tone + 100).all()
        assert (pixels[y, CELL[0] + 4 * WIDTH - 10] == tone + 120).all()
    assert sheet._labels == {
        "given": ["given: prompt 10", "given: prompt 50", "given: prompt 90"],
        "model": ["+ model", "- model", "+ model"],
    }  # fmt: skip


def test_a_single_case_fills_four_columns_and_a_sheet_ends() -> None:
    sheet = Sheet()
    for start in range(0, 40, 8):
        tones = range(start, start + 8)
        sheet.add("tiny", [f"prompt {tone}" for tone in tones], clips(*tones), torch.ones(8, dtype=torch.bool))
    assert sheet.draw().size == (4 * CELL[0], ROWS // 4 * CELL[1])
    assert sheet._labels["tiny"][-1] == f"+ tiny: prompt {ROWS - 1}"
