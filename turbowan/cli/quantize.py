"""`turbowan quantize`: a transformer in official int8 blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def quantize(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A full-precision transformer of any family.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A .safetensors file (least memory) or a .pth file.")],
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda or auto.")] = "cpu",
) -> None:
    """Round a transformer's large layers to int8 as TurboDiffusion's -quant files have them: half the size."""
    from ..checkpoints.quantize import quantize_checkpoint
    from ..engine import Progress, choose_device
    from ..terminal import ProgressLine

    line = ProgressLine()

    def report(done: int, total: int) -> None:
        line(Progress("quantize", done, total))

    quantize_checkpoint(source, target, choose_device(device), report)
    print(target)
