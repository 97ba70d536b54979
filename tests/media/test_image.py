"""Pictures as people have them: every mode, rotation and damage becomes an RGB picture or one clear line."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from turbowan.errors import MediaError
from turbowan.media.image import contact_sheet, read_image, to_tensor

SEED = random.randrange(2**31)


@pytest.fixture
def rng() -> np.random.Generator:
    print(f"seed {SEED}")
    return np.random.default_rng(SEED)


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (int(rng.integers(8, 40)), int(rng.integers(41, 60)), 3), dtype=np.uint8)


def refused(source: object) -> str:
    """The one line with which a picture is refused."""
    with pytest.raises(MediaError) as caught:
        read_image(source)  # type: ignore[arg-type]
    line = str(caught.value)
    assert line
    assert "\n" not in line
    return line


# What is read


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_a_file_gives_its_pixels(tmp_path: Path, pixels: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(pixels).save(path, **({"lossless": True} if suffix == "webp" else {}))
    for source in (path, str(path), Image.open(path), pixels):
        image = read_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), pixels)


def test_a_jpeg_is_close_to_its_pixels(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (48, 64, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.jpg", quality=95)
    image = np.asarray(read_image(tmp_path / "ramp.jpg")).astype(int)
    assert np.abs(image - ramp).mean() < 3


# What each EXIF orientation asks a viewer to do with the stored picture.
ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_rotation_is_applied(tmp_path: Path, pixels: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(pixels).save(path, exif=exif)
    assert np.array_equal(np.asarray(read_image(path)), ORIENTATIONS[orientation](pixels))
    assert np.array_equal(np.asarray(read_image(Image.open(path))), ORIENTATIONS[orientation](pixels))


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_alpha_is_laid_over_black(tmp_path: Path, pixels: np.ndarray, rng: np.random.Generator, suffix: str) -> None:
    alpha = rng.integers(0, 256, pixels.shape[:2], dtype=np.uint8)
    rgba = np.dstack([pixels, alpha])
    path = tmp_path / f"glass.{suffix}"
    Image.fromarray(rgba).save(path, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    wanted = pixels * (alpha[..., None] / 255)
    for source in (path, rgba, Image.fromarray(rgba)):
        assert np.abs(np.asarray(read_image(source)) - wanted).max() <= 1


def test_grey_with_alpha_and_a_transparent_palette_colour(tmp_path: Path, rng: np.random.Generator) -> None:
    grey, alpha = rng.integers(0, 256, (2, 9, 13), dtype=np.uint8)
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).save(tmp_path / "la.png")
    wanted = (grey * (alpha / 255))[..., None]
    assert np.abs(np.asarray(read_image(tmp_path / "la.png")) - wanted).max() <= 1

    index = rng.integers(0, 4, (9, 13), dtype=np.uint8)
    colours = rng.integers(1, 256, (4, 3), dtype=np.uint8)
    palette = Image.frombytes("P", (13, 9), index.tobytes())
    palette.putpalette(colours.flatten().tolist())
    palette.save(tmp_path / "p.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "p.png")), colours[index])
    palette.save(tmp_path / "t.gif", transparency=2)
    seen = np.where((index == 2)[..., None], 0, colours[index])
    assert np.array_equal(np.asarray(read_image(tmp_path / "t.gif")), seen)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, rng: np.random.Generator) -> None:
    wide = rng.integers(0, 65536, (21, 34), dtype=np.uint16)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide).save(tmp_path / "wide.tiff")
    wanted = np.rint(wide / 257)[..., None]
    for source in (tmp_path / "wide.png", tmp_path / "wide.tiff", wide, np.dstack([wide] * 3)):
        image = np.asarray(read_image(source)).astype(int)
        assert image.shape == (21, 34, 3)
        assert np.abs(image - wanted).max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "F", "I"])
def test_other_modes_become_rgb(mode: str) -> None:
    value = {"F": 0.5, "I": 128 * 257}.get(mode)
    image = Image.new(mode, (7, 5), value) if value else Image.new("RGB", (7, 5), (128, 128, 128)).convert(mode)
    out = np.asarray(read_image(image))
    assert out.shape == (5, 7, 3)
    if mode != "1":  # black and white dithers
        assert np.abs(out.astype(int) - 128).max() <= 2


@pytest.mark.parametrize("channels", [0, 3, 4])
def test_float_arrays_equal_their_bytes(rng: np.random.Generator, channels: int) -> None:
    array = rng.integers(0, 256, (11, 17, channels) if channels else (11, 17), dtype=np.uint8)
    for dtype in (np.float16, np.float32, np.float64):
        assert np.array_equal(np.asarray(read_image((array / 255).astype(dtype))), np.asarray(read_image(array)))


def test_a_phones_multi_picture_jpeg_gives_its_first(tmp_path: Path, pixels: np.ndarray) -> None:
    first, second = Image.new("RGB", (32, 16), (200, 40, 40)), Image.new("RGB", (32, 16), (40, 40, 200))
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    assert Image.open(tmp_path / "phone.jpg").n_frames == 2
    red, _, blue = np.asarray(read_image(tmp_path / "phone.jpg")).reshape(-1, 3).mean(axis=0)
    assert red > 150 > 100 > blue


def test_the_given_image_stays_as_it_was(pixels: np.ndarray) -> None:
    array, image = pixels.copy(), Image.fromarray(pixels)
    read_image(image).putpixel((0, 0), (1, 2, 3))
    read_image(array).putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(np.asarray(image), pixels)
    assert np.array_equal(array, pixels)


# What is refused


def test_missing_empty_and_other_files(tmp_path: Path) -> None:
    missing = tmp_path / "none.png"
    assert refused(missing) == f"{missing} does not exist"
    empty = tmp_path / "empty.png"
    empty.touch()
    assert "0 bytes" in refused(empty)
    text = tmp_path / "text.png"
    text.write_text("no picture at all" * 10)
    assert "170 bytes" in refused(text)
    assert str(tmp_path) in refused(tmp_path)  # a folder


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_animated_pictures(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (16, 16), (60 * i, 0, 0)) for i in range(3)]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert refused(path) == f"{path} is animated (3 frames); give one still picture"
    assert "animated (3 frames)" in refused(Image.open(path))


def test_a_gif_of_one_frame_is_a_still_picture(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (255, 0, 0)).save(tmp_path / "still.gif")
    assert read_image(tmp_path / "still.gif").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_no_pixels(size: tuple[int, int]) -> None:
    assert f"{size[0]}x{size[1]}" in refused(Image.new("RGB", size))


def test_huge_pictures(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    Image.new("1", (20_000, 20_000)).save(path)  # 50 kB that would become 1.2 GB
    line = refused(path)
    assert "too large" in line
    assert "400000000 pixels" in line


@pytest.mark.parametrize("shape", [(), (5,), (5, 5, 1), (5, 5, 2), (5, 5, 5), (1, 5, 5, 3), (0, 5, 3), (5, 0)])
def test_arrays_of_other_shapes(shape: tuple[int, ...]) -> None:
    assert str(list(shape)) in refused(np.zeros(shape, np.uint8))


def test_arrays_of_other_values() -> None:
    for dtype in (np.int64, np.int8, np.bool_, np.complex64, object):
        assert np.dtype(dtype).name in refused(np.zeros((4, 4, 3), dtype))
    assert "-1 to 1" in refused(np.linspace(-1, 1, 48).reshape(4, 4, 3))
    assert "0 to 255" in refused(np.linspace(0, 255, 48).reshape(4, 4, 3))
    assert "nan" in refused(np.full((4, 4, 3), np.nan))
    assert "[]" in refused({"no": "array"})


@pytest.mark.filterwarnings("ignore")  # Pillow warns of many of these files
@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "webp", "tiff", "bmp", "ppm", "jpeg2000", "ico"])
def test_damaged_files_give_a_picture_or_one_line(
    tmp_path: Path, pixels: np.ndarray, rng: np.random.Generator, suffix: str
) -> None:
    whole = io.BytesIO()
    Image.fromarray(pixels).save(whole, suffix)
    refusals = []
    for trial in range(40):
        data = bytearray(whole.getvalue())
        if trial % 2:
            data = data[: rng.integers(1, len(data) // 2)]
        else:
            for place in rng.integers(0, min(len(data), 300), rng.integers(1, 30)):
                data[place] = rng.integers(256)
        path = tmp_path / f"{trial}.{suffix}"
        path.write_bytes(data)
        try:
            assert read_image(path).mode == "RGB"
        except MediaError as error:
            refusals.append(str(error))
    assert len(refusals) >= 15  # at least the files cut in half
    assert all("\n" not in line and str(tmp_path) in line for line in refusals)


def test_reading_leaves_no_file_open(tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        read_image(tmp_path / "a.png")
        refused(tmp_path / "b.png")


# To the network


def test_to_tensor_resizes_as_the_official_code(rng: np.random.Generator) -> None:
    """torchvision's antialiased bilinear resize of an 8-bit tensor, straight to the size, is this interpolation."""
    for size, (height, width) in (((100, 300), (48, 64)), ((37, 21), (96, 160)), ((64, 64), (64, 64))):
        picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        ours = to_tensor(Image.fromarray(picture), height, width)
        assert ours.dtype == torch.float32
        assert ours.shape == (1, 3, height, width)
        tensor = torch.from_numpy(picture).permute(2, 0, 1)[None]
        theirs = F.interpolate(tensor, (height, width), mode="bilinear", antialias=True, align_corners=False)
        levels = ((ours * 0.5 + 0.5) * 255 - theirs.float()).abs()
        assert levels.max() <= 1.001
        assert levels.mean() < 0.1
        steps = (ours * 0.5 + 0.5) * 255
        assert (steps - steps.round()).abs().max() < 1e-3  # rounded to 8 bits before it becomes a float


def test_to_tensor_spans_minus_one_to_one() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[:, :, 0], picture[:, :, 1] = 255, 51
    out = to_tensor(Image.fromarray(picture), 4, 4)
    assert torch.allclose(out.mean(dim=(0, 2, 3)), torch.tensor([1.0, -0.6, -1.0]), atol=1e-6)


# Sheets


def test_contact_sheet_shows_first_to_last_frame_of_every_video() -> None:
    def video(red: int, frames: int) -> np.ndarray:
        out = np.zeros((frames, 20, 40, 3), np.uint8)
        out[..., 0], out[..., 1] = red, np.linspace(50, 250, frames).astype(np.uint8)[:, None, None]
        return out

    reds = [40, 90, 140, 190, 240]
    sheet = contact_sheet([video(red, 4 + i) for i, red in enumerate(reds)], [f"clip {red}" for red in reds], 3, 4, 40)
    assert sheet.size == (3 * (4 * 40 + 6), 2 * (20 + 18))
    for i, red in enumerate(reds):
        left, top = i % 3 * 166, i // 3 * 38
        shown = [sheet.getpixel((left + 40 * j + 20, top + 10)) for j in range(4)]
        assert [s[0] for s in shown] == [red] * 4
        assert shown[0][1] == 50
        assert shown[3][1] == 250
        assert shown[0][1] < shown[1][1] < shown[2][1] < shown[3][1]
        label = np.asarray(sheet.crop((left, top + 21, left + 160, top + 37)))
        assert label.max() > 150  # something is written under it


def test_contact_sheet_of_few_and_short_videos() -> None:
    sheet = contact_sheet([np.full((1, 16, 32, 3), 200, np.uint8)], ["one frame"], columns=4, frames=2, width=32)
    assert sheet.size == (2 * 32 + 6, 16 + 18)
    assert sheet.getpixel((5, 5)) == sheet.getpixel((40, 5)) == (200, 200, 200)
    with pytest.raises(ValueError, match="zip"):
        contact_sheet([np.zeros((1, 16, 16, 3), np.uint8)], [])
