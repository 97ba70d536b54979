"""From a request to frames, for real on the CPU: the embedded model, and image-to-video experts of random weights."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig

import turbowan
from turbowan import Engine, GenerateRequest, stages
from turbowan.checkpoints import load_text_encoder, load_transformer, load_vae
from turbowan.checkpoints.files import write_tensors
from turbowan.checkpoints.load import load_image_encoder
from turbowan.checkpoints.official import write_transformer
from turbowan.checkpoints.quantize import quantize_transformer
from turbowan.clock import STAGES, Clock
from turbowan.engine import EMBEDDED
from turbowan.errors import CheckpointError, MachineError, RequestError
from turbowan.media.image import to_tensor
from turbowan.models.image_encoder import ImageEncoder
from turbowan.models.transformer import AttentionConfig, TransformerConfig, WanTransformer
from turbowan.sampling import rcm
from turbowan.stages import Execution, Run, image_condition, to_uint8
from turbowan.world.analyse import analyse_camera, psnr
from turbowan.world.pictures import draw_pictures, move_camera
from turbowan.world.scenes import CAMERAS

TINY = EMBEDDED / "tiny"
PARTS = {
    "vae": TINY / "vae.safetensors",
    "text_encoder": TINY / "text_encoder.safetensors",
    "tokenizer": TINY / "tokenizer",
}
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
SMALL = {"width": 96, "height": 64, "num_frames": 9}


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return Engine.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two image-to-video experts with SLA and an image-to-video model of the first one's weights, int8 like all."""
    folder = tmp_path_factory.mktemp("experts")
    files = {}
    for name in ("high", "low"):
        net = WanTransformer(TransformerConfig(256, 512, 2, text_dim=128, in_dim=36, has_sla=True)).bfloat16()
        with torch.no_grad():
            net.head.head.weight.mul_(4)
        files[name] = folder / f"{name}.pth"
        write_tensors(files[name], write_transformer(quantize_transformer(net.state_dict())))
    return files


def quiet(engine: Engine, request: GenerateRequest, **more) -> turbowan.GenerateResult:
    """Generate without the note that few steps are few."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return engine.generate(request, **more)


def photo() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (60, 100, 3), dtype=np.uint8)


def test_result_holds_what_was_asked_for(tiny):
    result = quiet(tiny, GenerateRequest(prompt="a red circle", num_steps=2, num_samples=2, **SMALL))
    assert [video.shape for video in result.videos] == [(9, 64, 96, 3)] * 2
    assert result.frames.dtype == np.uint8
    assert not np.array_equal(*result.videos)
    assert tuple(result.stages) == STAGES
    for name in ("text", "denoise", "decode", "total"):
        assert result.stages[name] > 0
    assert result.stages["condition"] == result.stages["switch"] == result.stages["write"] == 0.0
    assert sum(v for k, v in result.stages.items() if k != "total") <= result.stages["total"]
    assert result.peak_memory["host"] > 10**8
    assert result.settings["num_steps"] == 2
    assert result.settings["guidance_scale"] == tiny.manifest.guidance_scale
    assert (result.settings["precision"], result.settings["linears"]) == ("float32", "int8_block")


def test_a_seed_repeats_bit_by_bit_and_another_does_not(tiny):
    first, again, other = (
        quiet(tiny, GenerateRequest(prompt="a red circle", num_steps=2, seed=seed, **SMALL)).frames
        for seed in (3, 3, 4)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_defaults_make_what_the_prompt_says(tiny):
    """The manifest's size and its four steps: a red thing on a blue ground."""
    request = GenerateRequest(prompt="a large red circle stays still on a plain blue background", seed=1)
    frames = tiny.generate(request).frames
    assert frames.shape == (33, 160, 256, 3)
    red, green, blue = (frames[16, ..., c].astype(int) for c in range(3))
    assert ((blue > red + 60) & (blue > green + 60)).mean() > 0.5
    assert 0.01 < ((red > blue + 60) & (red > green + 60)).mean() < 0.4


def test_progress_tells_every_stage_and_its_exception_ends_the_work(tiny):
    seen = []
    quiet(tiny, GenerateRequest(prompt="a red circle", num_steps=3, **SMALL), progress=seen.append)
    assert [(at.done, at.total) for at in seen if at.stage == "denoise"] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [at.done for at in seen if at.stage == "decode"] == [0, 1, 2, 3]

    def stop(at: turbowan.Progress) -> None:
        if (at.stage, at.done) == ("denoise", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(tiny, GenerateRequest(prompt="a red circle", num_steps=3, **SMALL), progress=stop)
    assert quiet(tiny, GenerateRequest(prompt="a red circle", num_steps=1, **SMALL)).frames.shape == (9, 64, 96, 3)


class Sink:
    """Notes what comes, and how far the decoder was then."""

    def __init__(self, fails_at: int = -1) -> None:
        self.begun: tuple = ()
        self.frames: dict[int, list[np.ndarray]] = {}
        self.events: list[object] = []
        self.fails_at = fails_at

    def begin(self, num_samples: int, num_frames: int, fps: int, settings) -> None:
        assert self.events == []
        self.begun = num_samples, num_frames, fps, settings

    def add(self, sample: int, frames: np.ndarray) -> None:
        self.events.append(sample)
        if len(self.events) == self.fails_at:
            raise OSError("no room")
        self.frames.setdefault(sample, []).append(frames.copy())


def test_a_sink_gets_the_frames_while_others_are_decoded(tiny, monkeypatch):
    """Samples in groups of two, then one; each chunk is handed over before the next is decoded."""
    monkeypatch.setitem(stages.DECODE_PIXELS, "cpu", 2 * 96 * 64)
    sink = Sink()
    request = GenerateRequest(prompt="a red circle", num_steps=1, num_samples=3, **SMALL)
    result = quiet(tiny, request, progress=sink.events.append, sink=sink)
    assert sink.begun == (3, 9, result.fps, result.settings)
    assert [[len(part) for part in sink.frames[i]] for i in range(3)] == [[1, 4, 4]] * 3
    for i, video in enumerate(result.videos):
        assert np.array_equal(np.concatenate(sink.frames[i]), video)
    decoding = [at for at in sink.events if isinstance(at, int) or at.stage == "decode"]
    order = [at if isinstance(at, int) else at.done for at in decoding]
    assert order == [0, *(0, 1, 2), *(0, 1, 4), *(0, 1, 6), *(2, 7), *(2, 8), *(2, 9)]


def test_a_sink_that_fails_ends_the_generation_and_the_next_one_works(tiny):
    request = GenerateRequest(prompt="a red circle", num_steps=1, **SMALL)
    sink = Sink(fails_at=2)
    with pytest.raises(OSError, match="no room"):
        quiet(tiny, request, sink=sink)
    assert sink.events == [0, 0]
    assert quiet(tiny, request, sink=(again := Sink())).frames.shape == (9, 64, 96, 3)
    assert again.events == [0, 0, 0]


def test_freed_memory_goes_back_after_each_request_however_it_ends(tiny, monkeypatch):
    done = []
    monkeypatch.setattr("turbowan.engine.trim_heap", lambda: done.append(1))
    request = GenerateRequest(prompt="a red circle", num_steps=1, **SMALL)
    quiet(tiny, request)
    assert len(done) == 1
    with pytest.raises(OSError, match="no room"):
        quiet(tiny, request, sink=Sink(fails_at=1))
    assert len(done) == 2


@pytest.mark.parametrize("sampler", ["rcm", "euler", "unipc"])
def test_previews_come_nearer_to_the_video_and_change_nothing(tiny, sampler):
    seen = []
    asked = {"prompt": "a large red circle on a plain blue background", "num_steps": 4, "sampler": sampler, **SMALL}
    request = GenerateRequest(num_samples=2, seed=3, **asked)
    result = quiet(tiny, request, preview=lambda step, frames: seen.append((step, frames)))
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert all((f.shape, f.dtype) == ((2, 3, 8, 12, 3), np.uint8) for _, f in seen)
    assert all(np.array_equal(a, b) for a, b in zip(result.videos, quiet(tiny, request).videos, strict=True))
    small = np.stack([video[[0, 3, 7]].reshape(3, 8, 8, 12, 8, 3).mean(axis=(2, 4)) for video in result.videos])
    error = [np.square(frames - small).mean() for _, frames in seen]
    assert error[-1] < error[0]
    assert 10 * np.log10(255**2 / error[-1]) > 13


def test_few_steps_of_an_undistilled_model_are_remarked_on():
    engine = Engine.load("tiny-base", device="cpu")
    with pytest.warns(UserWarning, match="4 steps are too few"):
        engine.generate(GenerateRequest(prompt="a red circle", num_steps=4, width=32, height=32, num_frames=1))


def test_the_embedded_experts_move_a_camera_over_a_picture():
    """Content that moves left under a camera that pans right: the judge of the world agrees."""
    generator = torch.Generator().manual_seed(900_000_123)
    picture = draw_pictures(1, generator)
    first = move_camera(picture, torch.tensor([1]), torch.tensor([0.5]), 5, 160, 256)[0, :, 0]
    image = ((first + 1) * 127.5).byte().permute(1, 2, 0).numpy()
    engine = Engine.load("tiny-i2v", device="cpu")
    result = engine.generate(GenerateRequest(prompt="the camera pans right", image=image, seed=3))
    video = torch.from_numpy(result.frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    assert CAMERAS[int(analyse_camera(video))] == "pan right"
    assert psnr(float((video[0, :, 0] - first).square().mean())) > 20


@pytest.mark.parametrize("sampler", ["rcm", "euler", "unipc"])
def test_every_sampler_runs_and_one_frame_is_a_picture(tiny, sampler):
    request = GenerateRequest(prompt="a red circle", sampler=sampler, num_steps=2, width=64, height=48, num_frames=1)
    assert quiet(tiny, request).frames.shape == (1, 48, 64, 3)


@pytest.mark.parametrize("prompt", ["一只红色的猫在草地上奔跑", "🚀" * 300, "a red circle " * 384])
def test_any_language_and_any_length_up_to_the_limit(tiny, prompt):
    request = GenerateRequest(prompt=prompt, num_steps=1, width=32, height=32, num_frames=1)
    assert quiet(tiny, request).frames.shape == (1, 32, 32, 3)


def test_two_experts_meet_at_the_boundary(experts):
    """rCM's times for 4 steps are 0.988 or more, then 0.93, 0.83 and 0.61: the boundary decides who does how many."""
    request = {"prompt": "a red circle", "image": photo(), "seed": 2, **SMALL}

    def frames(boundary: float, high: str = "high", low: str = "low") -> np.ndarray:
        engine = Engine.load(high_noise=experts[high], low_noise=experts[low], **PARTS, device="cpu")
        return engine.generate(GenerateRequest(boundary=boundary, **request)).frames

    single = Engine.load(transformer=experts["high"], **PARTS, device="cpu")
    alone = single.generate(GenerateRequest(sigma_max=200.0, **request)).frames
    assert np.array_equal(frames(0.0), alone)
    assert np.array_equal(frames(0.9, "high", "high"), alone)
    both = frames(0.9)
    assert not np.array_equal(both, alone)
    assert not np.array_equal(both, frames(0.9, "low", "low"))


@pytest.mark.parametrize("attention", ["original", "sla", "sagesla"])
def test_features_together_int8_attention_experts_memory(experts, attention):
    """Freeing every part after its stage, with int8 weights and two experts, changes no bit."""
    request = {"prompt": "a blue ring", "image": photo(), "attention": attention, "sla_topk": 0.5, "num_samples": 2}
    results = []
    for memory in ("speed", "minimal"):
        engine = Engine.load(high_noise=experts["high"], low_noise=experts["low"], **PARTS, device="cpu")
        results.append(engine.generate(GenerateRequest(memory=memory, seed=9, **request, **SMALL)))
    kept, freed = results
    assert all(np.array_equal(a, b) for a, b in zip(kept.videos, freed.videos, strict=True))
    assert freed.stages["load"] > 0
    assert freed.stages["condition"] > 0
    assert freed.settings["attention"] == attention


def test_the_switch_of_experts_is_one_stage_entered_once(experts, monkeypatch):
    entered = []
    stage = Clock.stage

    def counted(clock: Clock, name: str, exclusive: bool = True):
        entered.append(name)
        return stage(clock, name, exclusive)

    monkeypatch.setattr(Clock, "stage", counted)
    engine = Engine.load(high_noise=experts["high"], low_noise=experts["low"], **PARTS, device="cpu")
    engine.generate(GenerateRequest(prompt="a red circle", image=photo(), boundary=0.95, **SMALL))
    assert entered.count("switch") == 1  # before the first of three low-noise steps


def test_image_to_video_with_clip_tokens(tmp_path, fresh_seed, relative_error):
    """Wan 2.1's kind: CLIP sees the whole picture, whatever its shape, and its tokens reach the frames."""
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = ImageEncoder(CLIPVisionConfig(**sizes, image_size=28, patch_size=14, hidden_act="gelu")).model
    net = WanTransformer(TransformerConfig(256, 256, 1, text_dim=128, in_dim=36, image_dim=128))
    for role, module in (("clip", clip), ("net", net)):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        state = module.state_dict()
        prefix = "vision_model." if role == "clip" and "post_layernorm.weight" in state else ""
        write_tensors(tmp_path / f"{role}.safetensors", {prefix + key: value for key, value in state.items()})
    files = {"transformer": tmp_path / "net.safetensors", "image_encoder": tmp_path / "clip.safetensors"}
    engine = Engine.load(**files, **PARTS, device="cpu")

    def latent(image: np.ndarray) -> torch.Tensor:
        found = []
        decode = Run.decode

        def keep(run: Run, value: torch.Tensor, sink: object) -> list[np.ndarray]:
            found.append(value)
            return decode(run, value, sink)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "decode", keep)
            size = {"width": 64, "height": 48, "num_frames": 5}
            result = engine.generate(GenerateRequest(prompt="a red circle", image=image, num_steps=1, **size))
        assert result.frames.shape == (5, 48, 64, 3)
        return found[0]

    wide = np.random.default_rng(fresh_seed).integers(0, 256, (30, 90, 3), dtype=np.uint8)
    first = latent(wide)
    manual = load_transformer(files["transformer"])
    tokens = load_image_encoder(files["image_encoder"])(to_tensor(Image.fromarray(wide), 30, 90))
    vae, settings = load_vae(PARTS["vae"]), GenerateRequest(prompt="a red circle")
    known = image_condition(vae.encode_first_frame(to_tensor(Image.fromarray(wide), 48, 64), 5))
    ids, mask = engine.tokenizer([settings.prompt])
    text = load_text_encoder(PARTS["text_encoder"])(ids, mask)
    noise = torch.randn(1, 16, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    times = rcm.timesteps(1, engine.manifest.sigma_max)

    def velocity(x: torch.Tensor, t: float, step: int) -> torch.Tensor:
        timestep = (torch.tensor([t], dtype=torch.float32) * 1000).bfloat16().float()
        return manual(x.float().bfloat16().float(), timestep, text, known.bfloat16().float(), tokens)

    with torch.no_grad():
        expected = rcm.sample(velocity, [noise], times)
    assert relative_error(first, expected) < 1e-4
    assert relative_error(latent(wide[:, ::-1].copy()), first) > 1e-3


def test_linear_layers_as_asked_for(tiny):
    """On a CPU "auto" keeps what the file has; another format is another network, loaded anew and said."""
    results = {
        precision: quiet(tiny, GenerateRequest(prompt="a red circle", num_steps=1, precision=precision, **SMALL))
        for precision in ("auto", "int8_block", "int8", "fp8", "float32")
    }
    formats = {precision: result.settings["linears"] for precision, result in results.items()}
    blocks = dict.fromkeys(("auto", "int8_block", "float32"), "int8_block")
    assert formats == {**blocks, "int8": "int8_row", "fp8": "fp8_row"}
    same = {name: np.array_equal(result.frames, results["auto"].frames) for name, result in results.items()}
    assert same == {"auto": True, "int8_block": True, "float32": True, "int8": False, "fp8": False}


@pytest.mark.parametrize(
    ("capability", "dtype", "linears"),
    [
        ((7, 5), torch.float16, "int8_block"),
        ((8, 0), torch.bfloat16, "int8_block"),
        ((9, 0), torch.bfloat16, "int8_row"),
        ((10, 3), torch.bfloat16, "bf16"),
    ],
)
def test_what_auto_would_run_on_a_gpu(capability, dtype, linears, tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("turbowan.ops.registry._installed", lambda package: True)

    def execution(precision):
        request = GenerateRequest(prompt="a red circle", precision=precision)
        return Execution.of(request, torch.device("cuda"), AttentionConfig(), tiny.outlines)

    how = execution("auto")
    assert (how.dtype, how.facts()["linears"]) == (dtype, linears)
    lines = list(how.changes(tiny.outlines))
    assert len(lines) == (linears != "int8_block")
    assert all(line.startswith(f"transformer: linear layers run as {linears} (") for line in lines)
    assert all("against the original weights, 0.0132 in the file's format" in line for line in lines)
    assert all(line.endswith("--precision bf16 keeps the file's int8_block") for line in lines)
    assert execution("bf16").facts() == {"precision": "bfloat16", "linears": "int8_block"}
    assert execution("int8_block").facts()["linears"] == "int8_block"
    assert execution("int8").facts()["linears"] == "int8_row"
    plain, planned = tiny.part_sizes(how.dtype), tiny.part_sizes(how.dtype, how)
    assert (planned["transformer"].total > 1.5 * plain["transformer"].total) == (linears == "bf16")
    assert {role: size for role, size in plain.items() if role != "transformer"}.items() <= planned.items()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_plan_knows_what_the_parts_will_take_and_what_is_loaded(precision):
    """Part sizes from shapes alone are those of the loaded modules; another precision replaces, it does not add."""
    engine = Engine.load("tiny", device="cpu")
    for dtype in (torch.bfloat16 if precision == "float32" else torch.float32, _DTYPES[precision]):
        name = next(key for key, value in _DTYPES.items() if value == dtype)
        request = GenerateRequest(
            prompt="a red circle", num_steps=1, precision=name, memory="speed", width=32, height=32, num_frames=1
        )
        quiet(engine, request)
    sizes = engine.part_sizes(_DTYPES[precision])
    assert engine.parts.nbytes == pytest.approx(sum(size.total for size in sizes.values()), rel=0.01)


def test_a_second_request_finds_the_same_room(tiny, monkeypatch):
    plans = []
    real = turbowan.engine.make_plan
    monkeypatch.setattr("turbowan.engine.make_plan", lambda *a: plans.append(a) or real(*a))
    for _ in range(2):
        quiet(tiny, GenerateRequest(prompt="a ring", num_steps=1, width=32, height=32, num_frames=1, memory="speed"))
    first, second = (room.gpu for _, _, room, _ in plans)
    assert second == pytest.approx(first, rel=0.1)
    assert tiny.parts.nbytes > 0


@pytest.mark.parametrize("memory", ["auto", "minimal"])
def test_a_prompt_read_before_needs_no_encoder(memory, small_t2v, tmp_path, monkeypatch):
    """Guided, so that there is a negative prompt, too; the same frames, and another file's identity counts."""
    loads = []

    def counted(path, *args, **keywords):
        loads.append(path)
        return load_text_encoder(path, *args, **keywords)

    monkeypatch.setitem(turbowan.stages.LOADERS, "text_encoder", counted)
    encoder = tmp_path / "umt5.safetensors"
    encoder.write_bytes(PARTS["text_encoder"].read_bytes())
    engine = Engine.load(small_t2v, text_encoder=encoder, tokenizer=PARTS["tokenizer"], device="cpu")
    request = GenerateRequest(prompt="a red circle on a blue background", memory=memory)
    first, second = engine.generate(request), engine.generate(request)
    assert len(loads) == 1
    assert first.stages["text"] > 0 == second.stages["text"]
    assert np.array_equal(first.frames, second.frames)
    engine.parts.clear()
    engine.generate(GenerateRequest(prompt="a green square", memory=memory))
    assert len(loads) == 2
    encoder.write_bytes(PARTS["text_encoder"].read_bytes())
    engine.parts.clear()
    engine.generate(request)
    assert len(loads) == 3


def test_what_a_prompt_gives_depends_on_nothing_else(small_t2v, monkeypatch):
    """In a batch with longer ones, also as the negative prompt: its own embedding to the bit, then zeros."""
    told = []
    condition = Run.condition
    monkeypatch.setattr(Run, "condition", lambda run, texts, image: told.append(texts) or condition(run, texts, image))
    request = GenerateRequest(prompt="-", negative_prompt="a red ring", guidance_scale=3.0)
    prompts = ["a red ring", "a large blue square on a white background"]
    Engine.load(small_t2v, device="cpu").generate_batch(prompts, request)
    for prompt in prompts:
        Engine.load(small_t2v, device="cpu").generate_batch([prompt], replace(request, negative_prompt=prompt))
    (wanted, unwanted), *alone = told
    for i, (text, _) in enumerate(alone):
        own = text.shape[1]
        assert torch.equal(wanted[i, :own], text[0])
        assert not wanted[i, own - 1 :].any()
    assert all(torch.equal(row, wanted[0]) for row in unwanted)
    assert wanted.shape[1] == alone[1][0].shape[1]


@pytest.mark.parametrize("device", ["mps", "foo", "cuda:x"])
def test_devices_that_are_none_are_one_line(device):
    with pytest.raises(MachineError, match="device must be auto, cpu, cuda or cuda:N"):
        Engine.load("tiny", device=device)


def test_what_cannot_be_sampled_fails_before_any_work(tiny):
    seen = []
    with pytest.raises(RequestError):
        quiet(tiny, GenerateRequest(prompt="a ring", sampler="rcm", num_steps=8, sigma_max=10.0), progress=seen.append)
    assert seen == []


def test_image_decides_the_size_when_asked(experts):
    engine = Engine.load(high_noise=experts["high"], low_noise=experts["low"], **PARTS, device="cpu")
    request = GenerateRequest(
        prompt="a photo", image=photo(), width=96, height=96, adaptive_resolution=True, num_frames=1, num_steps=1
    )
    height, width = engine.generate(request).frames.shape[1:3]
    assert width > height  # the picture is 100 x 60
    assert width % 16 == height % 16 == 0
    assert abs(width * height - 96 * 96) / (96 * 96) < 0.25


def test_requests_that_do_not_fit_the_model(tiny, experts):
    with pytest.raises(RequestError, match="text-to-video; it takes no image"):
        tiny.generate(GenerateRequest(prompt="a red circle", image=photo()))
    i2v = Engine.load(high_noise=experts["high"], low_noise=experts["low"], **PARTS, device="cpu")
    with pytest.raises(RequestError, match="from an image; give one"):
        i2v.generate(GenerateRequest(prompt="a red circle"))
    with pytest.raises(RequestError, match="adaptive_resolution needs an image"):
        tiny.generate(GenerateRequest(prompt="a red circle", adaptive_resolution=True))
    with pytest.raises(CheckpointError, match="proj_l"):
        Engine.load("tiny-base", device="cpu").generate(GenerateRequest(prompt="a red circle", attention="sla"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_asking_for_it_is_an_error(tiny):
    with pytest.raises(MachineError, match="needs a CUDA device"):
        quiet(tiny, GenerateRequest(prompt="a red circle", noise_device="cuda", num_steps=1, **SMALL))
    with pytest.raises(MachineError, match="PyTorch sees 0 CUDA devices"):
        Engine.load("tiny", device="cuda:0")


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model 'huge'.*tiny"):
        Engine.load("huge")
    with pytest.raises(CheckpointError, match="is a single file; name it as --transformer"):
        Engine.load(TINY / "transformer.safetensors")
    with pytest.raises(CheckpointError, match=r"vae file .* does not exist"):
        Engine.load("tiny", vae=tmp_path / "none.safetensors")


def test_named_files_stand_before_the_models(experts):
    engine = Engine.load("tiny", transformer=experts["high"], device="cpu")
    assert engine.needs_image
    assert engine.manifest.files["vae"] == PARTS["vae"]


def test_bytes_are_rounded_as_the_official_code_does():
    values = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 1.0, 3.0])
    expected = [int(255 * min(max((v + 1) / 2, 0), 1) + 0.5) for v in values.tolist()]
    assert to_uint8(values).tolist() == expected
