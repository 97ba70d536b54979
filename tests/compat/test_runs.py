"""Both scripts for real on the CPU: files in the official layout in, a file as the official code writes it out."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from turbowan import Engine, GenerateRequest
from turbowan.checkpoints import load_text_encoder, load_transformer, load_vae
from turbowan.checkpoints.tokenizer import find_tokenizer
from turbowan.compat import official, wan2_1_t2v_infer, wan2_2_i2v_infer
from turbowan.media.video import write_video

pytestmark = pytest.mark.usefixtures("small_on_cpu")
FIXED = {"fps": 16, "sampler": "rcm", "guidance_scale": 1.0, "norms": "official", "noise_device": "cpu"}


def decode(path: Path) -> tuple[np.ndarray, float, str]:
    """uint8 [T, H, W, 3], frames per second, format of a video file."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate), f"{container.format.name} {stream.codec_context.pix_fmt}"


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((ours.astype(float) - theirs.astype(float)) ** 2)))


def official_frames(files, attention: str, seed: int, samples: int, round_time: bool = True) -> np.ndarray:
    """Text to video by the official order of work, stage by stage, without the engine: uint8 [T, H, samples * W, 3]."""
    ids, mask = find_tokenizer(files.text_encoder)(["a red circle"])
    net = load_transformer(files.dit, attention=attention, sla_topk=0.5, norms="official")
    angles = torch.tensor([np.arctan(80), 1.5, 1.4, 1.0, 0], dtype=torch.float64)
    times = angles.sin() / (angles.cos() + angles.sin())
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(samples, 16, 2, 12, 16, generator=generator)

    with torch.inference_mode():
        text = load_text_encoder(files.text_encoder)(ids, mask).expand(samples, -1, -1)
        latent = noise().double() * times[0]
        for now, following in pairwise(times):
            timestep = (now.float() * 1000).expand(samples)
            timestep = timestep.bfloat16() if round_time else timestep
            velocity = net(latent.bfloat16().float(), timestep.float(), text).double()
            latent = (1 - following) * (latent - now * velocity) + following * noise()
        video = load_vae(files.vae).decode(latent.float())
    values = (1 + video.clamp(-1, 1)) / 2
    return np.concatenate([(v * 255 + 0.5).to(torch.uint8).permute(1, 2, 3, 0).numpy() for v in values], axis=2)


@pytest.mark.parametrize(
    ("attention", "samples"), [("original", 1), ("sla", 1), ("sla", 2), ("sagesla", 1), ("sagesla", 2)]
)
def test_t2v_writes_what_the_engine_makes(files, tmp_path: Path, attention: str, samples: int):
    target = tmp_path / "made" / "video.mp4"
    flags = ["--num_frames", "5", "--num_samples", str(samples), "--attention_type", attention, "--sla_topk", "0.5"]
    wan2_1_t2v_infer.main(files.t2v(*flags, "--seed", "7", "--save_path", str(target)))

    engine = Engine.load(
        transformer=files.dit, vae=files.vae, text_encoder=files.text_encoder, block_q=128, block_k=64
    )
    request = GenerateRequest(
        prompt="a red circle", width=128, height=96, num_frames=5, num_steps=4, sigma_max=80, seed=7,
        num_samples=samples, attention=attention, sla_topk=0.5, **FIXED,
    )  # fmt: skip
    made = np.concatenate(engine.generate(request).videos, axis=2)

    frames, fps, form = decode(target)
    assert frames.shape == (5, 96, 128 * samples, 3)
    assert fps == 16
    assert form == "mov,mp4,m4a,3gp,3g2,mj2 yuv420p"
    assert b"crf=25.0" in target.read_bytes()  # x264 notes its settings
    reference, _, _ = decode(write_video(tmp_path / "reference.mp4", made, 16, crf=25))
    np.testing.assert_array_equal(frames, reference)
    assert psnr(frames, made) > 18  # noise, at a quarter of its colours
    assert made.std() > 5  # a picture, not a plain field
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("attention", ["original", "sla", "sagesla"])
def test_frames_are_those_of_the_official_order_of_work(files, attention: str):
    argv = files.t2v("--num_frames", "5", "--num_samples", "2", "--attention_type", attention, "--sla_topk", "0.5")
    args = wan2_1_t2v_infer.parser().parse_args([*argv, "--seed", "3"])
    engine = Engine.load(transformer=files.dit, vae=files.vae, text_encoder=files.text_encoder)
    made = np.concatenate(engine.generate(official.request(args, "cpu")).videos, axis=2)
    assert psnr(made, official_frames(files, attention, seed=3, samples=2)) > 50
    unrounded = official_frames(files, attention, seed=3, samples=2, round_time=False)
    assert psnr(made, unrounded) < 42  # the measure would show a timestep that is not rounded to bfloat16


def test_one_frame_is_a_jpeg_under_the_name_given(files, tmp_path: Path):
    target = tmp_path / "picture.mp4"
    wan2_1_t2v_infer.main(files.t2v("--num_frames", "1", "--num_samples", "2", "--save_path", str(target)))
    with Image.open(target) as image:
        assert (image.format, image.size) == ("JPEG", (256, 96))


@pytest.mark.parametrize(("frames", "suffix"), [("1", ".jpg"), ("5", ".mp4")])
def test_a_name_without_suffix_gets_one(files, tmp_path: Path, frames: str, suffix: str):
    wan2_1_t2v_infer.main(
        files.t2v("--num_frames", frames, "--aspect_ratio", "1:1", "--save_path", str(tmp_path / "picture"))
    )
    assert [path.name for path in tmp_path.iterdir()] == [f"picture{suffix}"]


def test_any_suffix_holds_an_mp4(files, tmp_path: Path):
    target = tmp_path / "video.avi"
    wan2_1_t2v_infer.main(files.t2v("--num_frames", "5", "--num_steps", "1", "--save_path", str(target)))
    frames, fps, form = decode(target)
    assert (frames.shape, fps, form[:7]) == ((5, 96, 128, 3), 16, "mov,mp4")


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        ([], {}),
        (["--ode", "--boundary", "0.99", "--sigma_max", "120"], {"ode": True, "boundary": 0.99, "sigma_max": 120}),
        (["--adaptive_resolution", "--num_samples", "2"], {"width": 144, "height": 80, "num_samples": 2}),
    ],
    ids=["defaults", "ode", "adaptive"],
)
def test_i2v_writes_what_the_engine_makes(files, tmp_path: Path, flags: list[str], fields: dict):
    target = tmp_path / "video.mp4"
    wan2_2_i2v_infer.main(files.i2v("--num_frames", "5", "--sla_topk", "0.5", *flags, "--save_path", str(target)))
    engine = Engine.load(
        high_noise=files.high, low_noise=files.low, vae=files.vae, text_encoder=files.text_encoder
    )
    settings = {
        "width": 128, "height": 96, "sigma_max": 200, "boundary": 0.9, "num_samples": 1, **FIXED, **fields
    }  # fmt: skip
    request = GenerateRequest(
        prompt="a red circle", image=files.image, num_frames=5, num_steps=4, attention="sagesla", sla_topk=0.5,
        **settings,
    )  # fmt: skip
    made = np.concatenate(engine.generate(request).videos, axis=2)
    frames, fps, _ = decode(target)
    assert frames.shape == (5, settings["height"], settings["width"] * settings["num_samples"], 3)
    assert fps == 16
    reference, _, _ = decode(write_video(tmp_path / "reference.mp4", made, 16, crf=25))
    np.testing.assert_array_equal(frames, reference)


def test_i2v_boundary_and_ode_take_effect(files, tmp_path: Path):
    videos = []
    for i, flags in enumerate(([], ["--boundary", "0.99"], ["--ode"], ["--sigma_max", "1600"], ["--seed", "1"])):
        target = tmp_path / f"{i}.mp4"
        wan2_2_i2v_infer.main(files.i2v("--num_frames", "1", *flags, "--save_path", str(target)))
        videos.append(target.read_bytes())
    assert len(set(videos)) == len(videos)


def test_without_cuda_one_note_says_so(files, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "video.mp4"
    wan2_1_t2v_infer.main(files.t2v("--num_frames", "1", "--num_steps", "1", "--save_path", str(target)))
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(target)]
    notes = err.splitlines()
    assert len(notes) == 1
    assert "note: no CUDA device" in notes[0]


def test_dense_attention_on_an_sla_file_and_on_a_plain_one(files, tmp_path: Path):
    """The flags that describe the file need not match it."""
    flags = ["--num_frames", "1", "--attention_type", "original", "--quant_linear", "--model", "Wan2.1-14B"]
    for name, dit in (("sla", files.dit), ("plain", files.plain)):
        target = tmp_path / f"{name}.jpg"
        wan2_1_t2v_infer.main(files.t2v(*flags, "--dit_path", str(dit), "--save_path", str(target)))
        assert Image.open(target).size == (128, 96)


BAD_T2V = [
    (["--serve"], "--serve"),
    (["--num_steps", "5"], "--num_steps"),
    (["--attention_type", "dense"], "--attention_type"),
    (["--model", "Wan2.2-A14B"], "--model"),
    (["--num_frames", "80"], "77 or 81"),
    (["--num_frames", "0"], "num_frames"),
    (["--num_samples", "0"], "num_samples"),
    (["--num_samples", "two"], "--num_samples"),
    (["--resolution", "999p"], "999p"),
    (["--aspect_ratio", "2:1"], "2:1"),
    (["--sla_topk", "0"], "sla_topk"),
    (["--sigma_max", "-1"], "sigma_max"),
    (["--sigma_max", "10"], "sigma_max"),
    (["--seed", "-1"], "seed"),
    (["--prompt", " "], "prompt is empty"),
    (["--dit_path", "no.pth"], "no.pth"),
    (["--vae_path", "no.pth"], "no.pth"),
    (["--text_encoder_path", "no.pth"], "no.pth"),
    (["--image_path", "x.png"], "--image_path"),
]


@pytest.mark.parametrize(("flags", "said"), BAD_T2V, ids=[" ".join(flags) for flags, _ in BAD_T2V])
def test_bad_input_is_one_line_and_exit_code_2(files, tmp_path, capsys, flags: list[str], said: str):
    target = tmp_path / "video.mp4"
    refused(wan2_1_t2v_infer, files.t2v("--save_path", str(target), *flags), capsys, said)
    assert not target.exists()


def test_bad_files_are_one_line_and_exit_code_2(files, tmp_path, capsys):
    quick = ["--num_frames", "1", "--save_path", str(tmp_path / "video.mp4")]
    refused(wan2_1_t2v_infer, files.t2v(*quick, "--dit_path", str(files.plain)), capsys, "'original'", "'sagesla'")
    refused(wan2_1_t2v_infer, files.t2v(*quick, "--dit_path", str(files.high)), capsys, "image")
    refused(wan2_1_t2v_infer, files.t2v(*quick, "--dit_path", str(files.vae)), capsys, "VAE")
    refused(wan2_1_t2v_infer, files.t2v(*quick, "--save_path", str(files.dit / "video.mp4")), capsys, "folder")
    refused(wan2_1_t2v_infer, files.t2v(*quick, "--save_path", str(tmp_path)), capsys, "is a folder")
    refused(wan2_2_i2v_infer, files.i2v(*quick, "--image_path", "no.png"), capsys, "no.png")
    refused(wan2_2_i2v_infer, files.i2v(*quick, "--high_noise_model_path", str(files.dit)), capsys, "experts differ")
    assert list(tmp_path.iterdir()) == []


def test_missing_flags_are_named(files, tmp_path, capsys):
    refused(wan2_1_t2v_infer, [], capsys, "--dit_path")
    refused(wan2_1_t2v_infer, ["--dit_path", str(files.dit)], capsys, "--prompt is required")
    refused(wan2_2_i2v_infer, [], capsys, "--high_noise_model_path, --low_noise_model_path")
    experts = ["--high_noise_model_path", str(files.high), "--low_noise_model_path", str(files.low)]
    refused(wan2_2_i2v_infer, [*experts, "--prompt", "a cat"], capsys, "--image_path is required")
    refused(wan2_2_i2v_infer, [*experts, "--image_path", str(files.image)], capsys, "--prompt is required")
    refused(wan2_2_i2v_infer, [*experts, "--serve"], capsys, "--serve is not supported")


def refused(script, argv: list[str], capsys, *said: str) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(argv)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if ": note: " not in line]
    assert (stop.value.code, out, len(lines)) == (2, "", 1), err
    assert all(word in lines[0] for word in said), err
