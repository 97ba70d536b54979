"""Bad files and pictures through `turbowan generate`: one line that names the fault, exit code 2, nothing written."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import turbowan
from turbowan.checkpoints.files import read_tensors, write_tensors
from turbowan.models.transformer import TransformerConfig, WanTransformer

TINY = Path(turbowan.__file__).parent / "assets" / "tiny"
SMALL = [
    "--model", "tiny", "--width", "64", "--height", "48", "--num-frames", "5", "--num-steps", "1",
    "--guidance-scale", "1",
]  # fmt: skip
CommandLine = Callable[..., tuple[int, str, str]]
State = dict[str, Tensor]


def random_transformer(**sizes: int) -> State:
    """In bfloat16, with the text width of the embedded encoder."""
    config = {"dim": 128, "ffn_dim": 192, "num_layers": 1, "text_dim": 128, "in_dim": 36, **sizes}
    state = WanTransformer(TransformerConfig(**config)).state_dict()
    return {key: value.detach().bfloat16() for key, value in state.items()}


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.path}",))


def wrong_family(folder: Path) -> Path:
    write_tensors(folder / "vace.safetensors", {**random_transformer(), "vace_blocks.0.after_proj.bias": torch.ones(1)})
    return folder / "vace.safetensors"


def a_lora(folder: Path) -> Path:
    write_tensors(folder / "lora.safetensors", {"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.ones(4, 128)})
    return folder / "lora.safetensors"


def wrong_role(folder: Path) -> Path:
    return TINY / "vae.safetensors"


def renamed_zip(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / f"zip{suffix}", "w") as archive:
            archive.writestr("readme.txt", "no weights in here\n" * 50)
        return folder / f"zip{suffix}"

    return make


def truncated(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_tensors(folder / f"cut{suffix}", random_transformer())
        os.truncate(folder / f"cut{suffix}", 100_000)
        return folder / f"cut{suffix}"

    return make


def zero_bytes(folder: Path) -> Path:
    (folder / "zero.pth").touch()
    return folder / "zero.pth"


def pickle_bomb(folder: Path) -> Path:
    torch.save({**random_transformer(), "bomb": Bomb(folder / "fired")}, folder / "bomb.pth")
    return folder / "bomb.pth"


def missing_keys(folder: Path) -> Path:
    state = {key: value for key, value in random_transformer().items() if "cross_attn.k" not in key}
    write_tensors(folder / "missing.pth", state)
    return folder / "missing.pth"


def extra_keys(folder: Path) -> Path:
    write_tensors(folder / "extra.pth", {**random_transformer(), "blocks.0.adapter.weight": torch.ones(4)})
    return folder / "extra.pth"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wrong_family, "vace.safetensors is of the family Wan VACE, which turbowan does not run"),
        (a_lora, "lora.safetensors is a LoRA, not a Wan model, VAE or text encoder"),
        (wrong_role, "vae.safetensors is a Wan VAE (wan layout, int8_row); a diffusion transformer is wanted here"),
        (renamed_zip(".pth"), "bytes) is not a readable PyTorch file"),
        (renamed_zip(".safetensors"), "bytes) is not a readable .safetensors file"),
        (truncated(".pth"), "cut.pth (100,000 bytes)"),
        (truncated(".safetensors"), "cut.safetensors (100,000 bytes) is not a readable .safetensors file"),
        (zero_bytes, "zero.pth is empty (0 bytes)"),
        (pickle_bomb, "holds pickled objects other than tensors"),
        (missing_keys, "missing.pth does not fit this model: 2 tensors are missing (e.g. blocks.0.cross_attn.k.bias)"),
        (extra_keys, "extra.pth does not fit this model: 1 tensors are not part of it (e.g. blocks.0.adapter.weight)"),
    ],
)
def test_bad_transformers(
    make: Callable[[Path], Path], message: str, command_line: CommandLine, tmp_path: Path, fresh_seed: int
) -> None:
    path = make(tmp_path)
    refused(command_line, tmp_path, message, "--transformer", path)
    assert not (tmp_path / "fired").exists()


def test_experts_of_two_sizes(command_line: CommandLine, tmp_path: Path, fresh_seed: int) -> None:
    """As a 1.3B expert beside one of A14B."""
    high, low = tmp_path / "high.safetensors", tmp_path / "low.safetensors"
    write_tensors(high, random_transformer(dim=384, num_layers=3))
    write_tensors(low, random_transformer(in_dim=16))
    message = f"the two experts differ (dim 384 and 128, num_layers 3 and 1, in_dim 36 and 16): {high}, {low}"
    refused(command_line, tmp_path, message, "--high-noise", high, "--low-noise", low)


@pytest.mark.parametrize(
    ("option", "role", "lost"),
    [("--vae", "VAE", "conv1.bias"), ("--text-encoder", "text encoder", "blocks.0.norm1.weight")],
)
def test_other_bad_parts(option: str, role: str, lost: str, command_line: CommandLine, tmp_path: Path) -> None:
    refused(command_line, tmp_path, f"a {role} is wanted here", option, TINY / "transformer.safetensors")
    state = read_tensors(TINY / f"{role.lower().replace(' ', '_')}.safetensors")
    del state[lost]
    write_tensors(tmp_path / "short.pth", state)
    refused(command_line, tmp_path, "1 tensors are missing", option, tmp_path / "short.pth")


def test_a_bad_image_encoder(command_line: CommandLine, tmp_path: Path) -> None:
    message = "a CLIP image encoder is wanted here"
    refused(command_line, tmp_path, message, "--image-encoder", TINY / "vae.safetensors")
    state = {"vision_model.embeddings.patch_embedding.weight": torch.zeros(64, 3, 14, 14)}
    write_tensors(tmp_path / "short.pth", state)
    message = "short.pth is incomplete: vision_model.embeddings.position_embedding.weight is missing among 1 tensors"
    refused(command_line, tmp_path, message, "--image-encoder", tmp_path / "short.pth")


def animated(folder: Path) -> Path:
    frames = [Image.fromarray(np.full((48, 64, 3), value, np.uint8)) for value in (0, 90, 180)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return folder / "moving.gif"


def without_pixels(folder: Path) -> Path:
    """A bitmap whose header says 0 x 48."""
    header = struct.pack("<IiiHHIIiiII", 40, 0, 48, 1, 24, 0, 0, 0, 0, 0, 0)
    (folder / "flat.bmp").write_bytes(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header)
    return folder / "flat.bmp"


def empty_image(folder: Path) -> Path:
    (folder / "empty.png").touch()
    return folder / "empty.png"


def cut_image(folder: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    Image.fromarray(noise).save(folder / "cut.jpg")
    os.truncate(folder / "cut.jpg", 5000)
    return folder / "cut.jpg"


def no_image(folder: Path) -> Path:
    (folder / "text.png").write_text("not a picture\n")
    return folder / "text.png"


@pytest.fixture
def image_to_video(tmp_path: Path, fresh_seed: int) -> Path:
    """A transformer of 36 channels that the embedded VAE and text encoder fit."""
    write_tensors(tmp_path / "i2v.safetensors", random_transformer())
    return tmp_path / "i2v.safetensors"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (animated, "moving.gif is animated (3 frames); give one still picture"),
        (without_pixels, "flat.bmp"),
        (empty_image, "empty.png is empty (0 bytes)"),
        (cut_image, "cut.jpg cannot be read as a picture; it may be damaged or cut off"),
        (no_image, "text.png (14 bytes) is not a picture"),
        (lambda folder: folder / "none.png", "none.png does not exist"),
    ],
)
def test_bad_images(
    make: Callable[[Path], Path], message: str, command_line: CommandLine, image_to_video: Path, tmp_path: Path
) -> None:
    refused(command_line, tmp_path, message, "--transformer", image_to_video, "--image", make(tmp_path))


def transparent(folder: Path) -> Path:
    pixels = np.random.default_rng(1).integers(0, 256, (48, 64, 4), np.uint8)
    Image.fromarray(pixels).save(folder / "transparent.png")
    return folder / "transparent.png"


def rotated_by_exif(folder: Path) -> Path:
    pixels = np.random.default_rng(2).integers(0, 256, (64, 48, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.fromarray(pixels).save(folder / "rotated.jpg", exif=exif)
    return folder / "rotated.jpg"


@pytest.mark.parametrize("make", [transparent, rotated_by_exif])
def test_alpha_and_exif_are_taken(
    make: Callable[[Path], Path], command_line: CommandLine, image_to_video: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out" / "v.mp4"
    given = [*SMALL, "--transformer", image_to_video, "--image", make(tmp_path), "-o", target]
    code, out, err = command_line("generate", "--prompt", "a red circle", *given)
    assert code == 0, err
    assert out == f"{target}\n"
    with av.open(str(target)) as container:
        assert [(frame.width, frame.height) for frame in container.decode(video=0)] == [(64, 48)] * 5


def refused(command_line: CommandLine, folder: Path, message: str, *arguments: object) -> None:
    """One line on standard error with the message, exit code 2, nothing on standard output or in the output folder."""
    target = folder / "out" / "v.mp4"
    code, out, err = command_line("generate", "--prompt", "a red circle", "-o", target, *SMALL, *arguments)
    assert (code, out) == (2, ""), err
    assert message in err
    assert err.startswith("turbowan: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert not list(folder.glob("out/*"))
