"""What both official scripts share: their flags, what these ask of the engine, and the run from flags to file."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import Note, RequestError

if TYPE_CHECKING:
    from ..request import GenerateRequest

FPS = 16
CRF = 25  # imageio's quality 5
HOPPER = (9, 0)


class Parser(argparse.ArgumentParser):
    """The flags of both scripts, with the official names, choices and defaults. A mistake is one line, as elsewhere."""

    def __init__(
        self, program: str, description: str, models: Sequence[str], sigma_max: float, resolution: str
    ) -> None:
        super().__init__(prog=program, description=description)
        add = self.add_argument
        add("--model", choices=models, default=models[0], help="accepted; sizes are read from the file")
        add("--prompt", help="what the video shows (required)")
        add("--num_samples", type=int, default=1, help="videos from one prompt, side by side in one file")
        add("--num_steps", type=int, choices=[1, 2, 3, 4], default=4)
        add("--num_frames", type=int, default=81, help="4k+1")
        add("--sigma_max", type=float, default=sigma_max, help="first noise level")
        add("--resolution", default=resolution, help="480p, 720p, 480, 512 or 720")
        add("--aspect_ratio", default="16:9", help="16:9, 9:16, 4:3, 3:4 or 1:1")
        add("--seed", type=int, default=0)
        add("--vae_path", default="checkpoints/Wan2.1_VAE.pth")
        add("--text_encoder_path", default="checkpoints/models_t5_umt5-xxl-enc-bf16.pth")
        add(
            "--save_path", default="output/generated_video.mp4",
            help="an mp4, or a JPEG for one frame, whatever its suffix",
        )  # fmt: skip
        add("--attention_type", choices=["sla", "sagesla", "original"], default="sagesla")
        add("--sla_topk", type=float, default=0.1, help="share of key blocks that SLA and SageSLA keep")
        add("--quant_linear", action="store_true", help="accepted; a quantised file runs quantised")
        add("--default_norm", action="store_true", help="exact LayerNorm instead of the official fast kernel's")
        add("--serve", action="store_true", help="not supported")

    def error(self, message: str) -> NoReturn:
        raise RequestError(message)


def blocks(attention_type: str, capability: tuple[int, int] | None) -> tuple[int, int]:
    """Tokens per block of queries and of keys: as the official code has them on a GPU of this capability (or none)."""
    if attention_type == "sagesla" and capability == HOPPER:
        return 64, 128
    return 128, 64


def request(args: argparse.Namespace, noise_device: str, **more: Any) -> GenerateRequest:
    """What the flags of both scripts ask for; `more` are the fields of one script's own flags."""
    from ..request import GenerateRequest

    return GenerateRequest(
        prompt=args.prompt,
        resolution=args.resolution,
        aspect_ratio=args.aspect_ratio,
        num_frames=args.num_frames,
        fps=FPS,
        num_steps=args.num_steps,
        sampler="rcm",
        sigma_max=args.sigma_max,
        guidance_scale=1.0,
        seed=args.seed,
        noise_device=noise_device,
        num_samples=args.num_samples,
        precision="bf16" if noise_device == "cuda" else "auto",  # linear layers as the file has them
        attention=args.attention_type,
        sla_topk=args.sla_topk,
        norms="exact" if args.default_norm else "official",
        **more,
    )


def run(args: argparse.Namespace, files: dict[str, Any], **more: Any) -> Path:
    """From flags to the file written.

    Args:
        files: the transformers by role, as `Engine.load` takes them.
        more: fields of GenerateRequest from one script's own flags.

    Raises:
        TurbowanError: --serve, a missing prompt, or whatever the engine finds wrong.
    """
    if args.serve:
        raise RequestError("--serve is not supported; run the command once for each prompt")
    if args.prompt is None:
        raise RequestError("--prompt is required")
    import torch

    from ..engine import Engine, choose_device
    from ..media.saving import save_side_by_side
    from ..media.video import check_target
    from ..terminal import ProgressLine

    device = choose_device("auto")
    on_gpu = device.type == "cuda"
    job = request(args, "cuda" if on_gpu else "cpu", **more)
    capability = torch.cuda.get_device_capability(device) if on_gpu else None
    block_q, block_k = blocks(args.attention_type, capability)
    parts = {"vae": args.vae_path, "text_encoder": args.text_encoder_path, **files}
    engine = Engine.load(**parts, device=device, block_q=block_q, block_k=block_k)
    target = Path(args.save_path)
    check_target(target, any_suffix=True)
    if not on_gpu:
        note = "no CUDA device: the CPU draws the noise, so pictures are not the official code's"
        warnings.warn(note, Note, stacklevel=2)
    return save_side_by_side(engine.generate(job, ProgressLine()), target, CRF)
