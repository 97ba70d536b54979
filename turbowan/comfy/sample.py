"""Nodes that sample on the engine's own steps."""

from __future__ import annotations

from typing import Any

from ..errors import RequestError
from ..specs import ASPECT_RATIOS
from . import foreign
from .checks import IMAGE_CHANNELS, SIZES, check_model, check_pair, check_size, choose_size, frame_count
from .environment import default_steps
from .inputs import combo, link, number, seed, switch, whole

STEPS = (1, 2, 3, 4)
STEPS_TIP = "Evaluations of the model, 1 to 4. 4 looks best."
BOUNDARY_TIP = "Time (0..1) down to which the high-noise expert works; 0.9 for Wan 2.2 image-to-video."
SIGMA_TIP = "First noise level: 200 for image to video, 80 for text to video."
ODE_TIP = "Deterministic steps instead of fresh noise in each: sharper edges, less variety."
HIGH_TIP = "The high-noise expert. It is loaded right before its steps."
LOW_TIP = "The low-noise expert, for the last steps."
BOUNDARY_MODES = ("timestep", "step_fraction")


class TurboDiffusionI2VSampler:
    """Two experts, a text and a picture to frames."""

    DESCRIPTION = "Makes a video from a start picture with Wan 2.2's two experts in 1 to 4 steps, decoded to frames."
    CATEGORY = "video/turbodiffusion"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("frames",)
    FUNCTION = "generate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        size = "Of the video; '480' and '480p' differ. 'custom' takes width and height. The picture is cut to fit."
        mode = "How the boundary is meant: a time (as the official code), or a share of the steps (as the first nodes)."
        return {
            "required": {
                "high_noise_model": link("MODEL", HIGH_TIP),
                "low_noise_model": link("MODEL", LOW_TIP),
                "conditioning": link("CONDITIONING", "The prompt, from CLIPTextEncode."),
                "vae": link("VAE", "The Wan 2.1 VAE, from any loader."),
                "image": link("IMAGE", "The video's first frame."),
                "num_frames": whole(77, 5, 241, "Frames, 4n+1; other counts are rounded down.", 4),
                "num_steps": combo(STEPS, STEPS_TIP, 4),
                "resolution": combo(SIZES, size, "480"),
                "aspect_ratio": combo(ASPECT_RATIOS, "Width to height.", "16:9"),
                "boundary": number(0.9, 0.0, 1.0, 0.001, BOUNDARY_TIP),
                "sigma_max": number(200.0, 1.0, 1000.0, 0.1, SIGMA_TIP),
                "seed": seed(),
                "use_ode": switch(False, ODE_TIP),
            },
            "optional": {
                "width": whole(480, 64, 2048, "Pixels, of 'custom'; rounded to a multiple of 16.", 16),
                "height": whole(480, 64, 2048, "Pixels, of 'custom'; rounded to a multiple of 16.", 16),
                "boundary_mode": combo(BOUNDARY_MODES, mode, "timestep"),
            },
        }

    def generate(
        self,
        high_noise_model: Any,
        low_noise_model: Any,
        conditioning: Any,
        vae: Any,
        image: Any,
        num_frames: int,
        num_steps: int,
        resolution: str,
        aspect_ratio: str,
        boundary: float,
        sigma_max: float,
        seed: int,
        use_ode: bool,
        width: int = 480,
        height: int = 480,
        boundary_mode: str = "timestep",
    ) -> tuple:
        from . import first_frame

        num_frames = frame_count(num_frames, "num_frames")
        width, height = choose_size(resolution, aspect_ratio, width, height)
        models = {"high_noise_model": high_noise_model, "low_noise_model": low_noise_model}
        conditioning = foreign.core_form(conditioning, "conditioning")
        check_experts(models, conditioning, IMAGE_CHANNELS)
        picture = first_frame.only_first(image)
        values = first_frame.condition(vae, picture, width, height, num_frames, ("lanczos", "center"))
        told = first_frame.told(conditioning, values)
        shape = first_frame.latent_shape(width, height, num_frames)
        samples = sample(models, told, shape, num_steps, boundary, sigma_max, seed, use_ode, boundary_mode)
        return (decode(vae, samples),)


class TurboWanDualExpertSampler:
    """Two experts, conditioning and latent to LATENT."""

    DESCRIPTION = "Samples with Wan 2.2's two experts in 1 to 4 steps. The latent's size counts, not its content."
    CATEGORY = "sampling/turbodiffusion"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "high_noise_model": link("MODEL", HIGH_TIP),
                "low_noise_model": link("MODEL", LOW_TIP),
                "latent": link("LATENT", "Gives the size; of TurboWan I2V Prepare, WanImageToVideo and the like."),
                "conditioning": link("CONDITIONING", "Prompt and start picture."),
                "num_steps": combo(STEPS, STEPS_TIP, 4),
                "boundary": number(0.9, 0.0, 1.0, 0.001, BOUNDARY_TIP),
                "seed": seed(),
                "use_ode": switch(True, ODE_TIP),
                "sigma_max": number(200.0, 1.0, 1000.0, 0.1, SIGMA_TIP),
            }
        }

    def sample(
        self,
        high_noise_model: Any,
        low_noise_model: Any,
        latent: Any,
        conditioning: Any,
        num_steps: int,
        boundary: float,
        seed: int,
        use_ode: bool,
        sigma_max: float,
    ) -> tuple:
        models = {"high_noise_model": high_noise_model, "low_noise_model": low_noise_model}
        conditioning = foreign.core_form(conditioning, "conditioning")
        check_experts(models, conditioning, None)
        shape = shape_of(latent)
        samples = sample(models, conditioning, shape, num_steps, boundary, sigma_max, seed, use_ode)
        return ({**latent, "samples": samples},)


class TurboWanVideoSampler:
    """One model or two, text and perhaps a picture to LATENT."""

    DESCRIPTION = (
        "Makes a video's latent from a prompt, and from a start picture with an image-to-video model, in 1 to 4 steps."
        " Decode it with VAEDecode."
    )
    CATEGORY = "sampling/turbodiffusion"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        level = "First noise level; -1: 80 for text to video, 200 for image to video."
        return {
            "required": {
                "model": link("MODEL", "The model, or the high-noise expert."),
                "positive": link("CONDITIONING", "The prompt, from CLIPTextEncode."),
            },
            "optional": {
                "low_noise_model": link("MODEL", "The low-noise expert, if the loader did not pair them."),
                "vae": link("VAE", "The Wan 2.1 VAE; needed with an image."),
                "image": link("IMAGE", "The video's first frame, for image-to-video models; cut to fit."),
                "latent": link("LATENT", "Gives the size in the place of width, height and num_frames."),
                "negative": link("CONDITIONING", "Not used: distilled models run without guidance."),
                "width": whole(832, 64, 4096, "Pixels, a multiple of 16.", 16),
                "height": whole(480, 64, 4096, "Pixels, a multiple of 16.", 16),
                "num_frames": whole(81, 5, 241, "Frames, 4n+1: 81 are five seconds at Wan's 16 a second.", 4),
                "num_steps": combo(STEPS, STEPS_TIP, default_steps()),
                "boundary": number(0.9, 0.0, 1.0, 0.001, BOUNDARY_TIP),
                "sigma_max": number(-1.0, -1.0, 1000.0, 0.1, level),
                "seed": seed(),
                "use_ode": switch(False, ODE_TIP),
            },
        }

    def sample(
        self,
        model: Any,
        positive: Any,
        low_noise_model: Any = None,
        vae: Any = None,
        image: Any = None,
        latent: Any = None,
        negative: Any = None,
        width: int = 832,
        height: int = 480,
        num_frames: int = 81,
        num_steps: int | None = None,
        boundary: float = 0.9,
        sigma_max: float = -1.0,
        seed: int = 0,
        use_ode: bool = False,
    ) -> tuple:
        from . import first_frame
        from .model import PAIR

        positive = foreign.core_form(positive, "positive")
        check_model(model, "model", positive, None, "positive")
        low_noise_model = low_noise_model or model.get_attachment(PAIR)
        models = {"model": model}
        if low_noise_model is not None:
            models["low_noise_model"] = low_noise_model
            check_experts(models, positive, None, "positive")
        takes_image = model.model.diffusion_model.patch_embedding.weight.shape[1] == IMAGE_CHANNELS
        if latent is not None:
            shape = shape_of(latent)
            width, height, num_frames = shape[4] * 8, shape[3] * 8, shape[2] * 4 - 3
        else:
            check_size(width, height)
            num_frames = frame_count(num_frames, "num_frames")
            shape = first_frame.latent_shape(width, height, num_frames)
        if image is not None:
            if not takes_image:
                raise RequestError("image: this model is text-to-video (16 channels); it takes no image")
            if vae is None:
                raise RequestError("vae: link a VAE too; the image is encoded with it")
            picture = first_frame.only_first(image)
            values = first_frame.condition(vae, picture, width, height, num_frames, ("lanczos", "center"))
            positive = first_frame.told(positive, values)
        if sigma_max < 1:
            sigma_max = 200.0 if takes_image else 80.0
        steps = num_steps or default_steps()
        return ({"samples": sample(models, positive, shape, steps, boundary, sigma_max, seed, use_ode)},)


def check_experts(models: dict[str, Any], conditioning: Any, channels: int | None, text: str = "conditioning") -> None:
    """`check_model` of each, and that they are a pair."""
    for label, model in models.items():
        check_model(model, label, conditioning, channels, text)
    check_pair(*models.values())


def shape_of(latent: Any) -> tuple[int, ...]:
    """The shape of a LATENT's samples.

    Raises:
        RequestError: they are no video latent of Wan's.
    """
    samples = latent["samples"]
    if samples.ndim != 5 or samples.shape[1] != 16:
        raise RequestError(f"latent: a Wan video latent is [B, 16, T, h, w], got {list(samples.shape)}")
    return tuple(samples.shape)


def sample(
    models: dict[str, Any],
    conditioning: Any,
    shape: tuple[int, ...],
    num_steps: int,
    boundary: float,
    sigma_max: float,
    seed: int,
    ode: bool,
    boundary_mode: str = "timestep",
) -> Any:
    """LATENT's samples from one model, or from the high-noise expert and the low-noise one, by input.

    Raises:
        RequestError: an image-to-video model is told of no picture.
    """
    from ..sampling import rcm
    from ..sampling.experts import switch_step
    from .steps import Expert, denoise

    first = next(iter(models.values())).model.diffusion_model
    if first.patch_embedding.weight.shape[1] == IMAGE_CHANNELS and "concat_latent_image" not in conditioning[0][1]:
        raise RequestError(
            "conditioning: this image-to-video model (36 channels) needs a start picture in it;"
            " put TurboWan I2V Prepare or WanImageToVideo before"
        )
    times = rcm.timesteps(num_steps, sigma_max)
    high = int(num_steps * boundary) if boundary_mode == "step_fraction" else switch_step(times.tolist(), boundary)
    counts = (num_steps,) if len(models) == 1 else (high, num_steps - high)
    experts = [Expert(model, count) for model, count in zip(models.values(), counts, strict=True)]
    return denoise(experts, conditioning, shape, times, seed, ode)


def decode(vae: Any, samples: Any) -> Any:
    """IMAGE [T, H, W, 3] float32 in 0..1 on the CPU."""
    return vae.decode(samples).flatten(0, 1).float().cpu()
