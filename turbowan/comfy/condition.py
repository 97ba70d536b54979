"""Nodes that prepare what a sampler is told."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from . import folders, load_vae
from .checks import check_prompt, check_size, frame_count
from .inputs import combo, link, text, whole

POSITIVE, NEGATIVE = "smooth camera motion, cinematic, high quality", "static, blurry, low quality, distorted"
LENGTH_TIP = "Frames, 4n+1: 81 are five seconds at Wan's 16 a second."
NEGATIVE_TIP = "Not used: distilled models run without guidance. Kept for graphs that have it."


class TurboWanSampler:
    """Conditions for an image-to-video model, and the empty latent to sample from; it does not sample itself."""

    DESCRIPTION = (
        "Puts start pictures into the conditioning of an image-to-video model and makes the empty latent. Does not"
        " sample: link its outputs to a KSampler, as with ComfyUI's WanImageToVideo."
    )
    CATEGORY = "video/turbodiffusion"
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "negative", "latent")
    FUNCTION = "prepare"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "positive": link("CONDITIONING", "The prompt, from CLIPTextEncode."),
                "negative": link("CONDITIONING", "What to avoid; used with guidance (cfg above 1) only."),
                "vae": link("VAE", "The Wan 2.1 VAE, from any loader."),
                "width": whole(480, 64, 2048, "Pixels, a multiple of 16.", 8),
                "height": whole(480, 64, 2048, "Pixels, a multiple of 16.", 8),
                "length": whole(121, 5, 241, LENGTH_TIP, 4),
                "batch_size": whole(1, 1, 64, "Videos at once."),
            },
            "optional": {
                "start_image": link("IMAGE", "The video's first frame, or its first few."),
                "clip_vision_output": link("CLIP_VISION_OUTPUT", "Of CLIPVisionEncode, for Wan 2.1 models."),
            },
        }

    def prepare(
        self,
        positive: Any,
        negative: Any,
        vae: Any,
        width: int,
        height: int,
        length: int,
        batch_size: int,
        start_image: Any = None,
        clip_vision_output: Any = None,
    ) -> tuple:
        check_size(width, height)
        from . import first_frame

        length = frame_count(length, "length")
        values: dict[str, Any] = {}
        if start_image is not None:
            values |= first_frame.condition(vae, start_image, width, height, length, ("bilinear", "center"))
        if clip_vision_output is not None:
            values["clip_vision_output"] = clip_vision_output
        told = [first_frame.told(each, values) if values else each for each in (positive, negative)]
        return (*told, first_frame.empty_latent(width, height, length, batch_size))


class TurboWanI2VPrepare:
    """Prompt and picture to CONDITIONING and LATENT, with files of its own."""

    DESCRIPTION = "Encodes prompt and start picture for an image-to-video model, loading text encoder and VAE itself."
    CATEGORY = "conditioning/turbodiffusion"
    RETURN_TYPES = ("CONDITIONING", "LATENT")
    FUNCTION = "prepare"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "text_encoder": combo(folders.choices(folders.TEXT_ENCODERS), "The umT5 text encoder."),
                "vae_path": combo(folders.vae_choices(), "The Wan 2.1 VAE."),
                "start_image": link("IMAGE", "The video's first frame; cut to the size in its middle."),
                "positive_prompt": text(POSITIVE, "What happens in the video.", multiline=True),
                "negative_prompt": text(NEGATIVE, NEGATIVE_TIP, multiline=True),
                "width": whole(1280, 64, 2048, "Pixels, a multiple of 16.", 16),
                "height": whole(720, 64, 2048, "Pixels, a multiple of 16.", 16),
                "num_frames": whole(121, 5, 241, LENGTH_TIP, 4),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, text_encoder: str, vae_path: str) -> bool | str:  # noqa: N802
        found = folders.check(text_encoder, (folders.TEXT_ENCODERS,), "text_encoder")
        return found if found is not True else folders.check(vae_path, load_vae.KINDS, "vae_path")

    def prepare(
        self,
        text_encoder: str,
        vae_path: str,
        start_image: Any,
        positive_prompt: str,
        negative_prompt: str,
        width: int,
        height: int,
        num_frames: int,
    ) -> tuple:
        check_prompt(positive_prompt, "positive_prompt")
        vae = load_vae.load(vae_path, "vae_path")
        return prepare(text_encoder, vae, start_image, positive_prompt, width, height, num_frames, "center")


def prepare(
    text_encoder: str, vae: Any, image: Any, prompt: str, width: int, height: int, num_frames: int, crop: str
) -> tuple[Any, dict]:
    """CONDITIONING of a prompt and a start picture, and the empty LATENT. crop: "center", or "disabled" to stretch."""
    check_size(width, height)
    from . import first_frame

    num_frames = frame_count(num_frames, "num_frames")
    values = first_frame.condition(vae, first_frame.only_first(image), width, height, num_frames, ("bilinear", crop))
    conditioning = first_frame.told(encode_text(text_encoder, prompt), values)
    return conditioning, first_frame.empty_latent(width, height, num_frames)


def encode_text(text_encoder: str, prompt: str) -> Any:
    """CONDITIONING of a prompt. The last encoder stays on the host: the next prompt needs it again."""
    path = folders.find(text_encoder, (folders.TEXT_ENCODERS,), "text_encoder")
    clip = _kept_clip(path, path.stat().st_mtime_ns)
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


@lru_cache(maxsize=1)
def _kept_clip(path: Path, changed: int) -> Any:
    from .clip import load_clip

    return load_clip(path)
