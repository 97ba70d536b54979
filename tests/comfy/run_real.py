"""Our nodes in a real, unmodified ComfyUI: `python tests/comfy/run_real.py FOLDER [--python PYTHON] [-k WORD]`.

FOLDER is ComfyUI's; PYTHON has its packages (by default FOLDER/../venv/bin/python, else this one). The embedded models
and the recorded cases of `tests/golden` are all it needs. Each case prints one line; the exit status is 1 where one
fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import torch
from PIL import Image
from real_cases import Cases, parser
from real_server import HERE, REPOSITORY, Failed, Interrupted, Refused, Server, python_of
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(REPOSITORY))

from real_graphs import Graph, changed, image_to_video, node, recorded, sample_custom, text_to_video
from real_reference import (
    GOLDEN,
    apart,
    golden_file,
    in_floats,
    kept,
    ours,
    plain_vae,
    plain_wan,
    random_lora,
    read_frames,
)

import turbowan
from turbowan.checkpoints import load_transformer

TINY = REPOSITORY / "turbowan" / "assets" / "tiny"
case = Cases()


@case
def contract(server: Server) -> str:
    """Keys, inputs, order, defaults, ranges and options as `contract.json` has them."""
    table, info = json.loads((HERE / "contract.json").read_text()), server.get("/object_info")
    for key, wanted in table.items():
        assert key in info, f"{key} is not there"
        found = info[key]
        assert found["category"] == wanted["category"], (key, found["category"])
        assert found["output"] == wanted["outputs"], (key, found["output"])
        for section in ("required", "optional"):
            inputs = found["input"].get(section, {})
            assert found["input_order"].get(section, []) == list(wanted[section]), (key, list(inputs))
            for name, expected in wanted[section].items():
                kind, options = inputs[name]
                got = {k: options[k] for k in ("default", "min", "max", "step") if k in options}
                got["type"] = "COMBO" if isinstance(kind, list) else kind
                if "options" in expected:
                    got["options"] = kind
                expected = {k: v for k, v in expected.items() if k != "files"}
                assert got == expected, f"{key}.{name}: {got}, expected {expected}"
                assert options["tooltip"], f"{key}.{name} has no tooltip"
    return f"{len(table)} nodes"


@case
def text_to_video_saves_a_video(server: Server) -> str:
    seed = fresh_seed()
    entry = server.run(text_to_video(seed))["save"]["images"][0]
    frames = read_frames(server.file(entry))
    assert frames.shape == (9, 96, 128, 3), frames.shape
    red, blue = (frames[..., 0] > 150).mean(), (frames[..., 2] > 150).mean()
    assert min(red / 0.01, blue / 0.5) > 1, f"no red circle on blue (seed {seed}): {red:.3f} red, {blue:.3f} blue"
    return f"{red:.1%} red, {blue:.1%} blue"


@case
def core_samplers_equal_the_engine(server: Server) -> str:
    worst = 0.0
    seed = fresh_seed()
    files = {"t2v-tiny.pth": ("original", "sla"), "t2v-tiny-quant.pth": ("sla", "sagesla")}
    for file, kinds in files.items():
        for attention in kinds:
            net = load_transformer(golden_file(file), attention=attention, sla_topk=0.25)
            for sampler in ("euler", "lcm"):
                single = file.endswith("quant.pth")
                got = kept(server, recorded(seed, file, attention, sampler))
                error = apart(got, ours(net, seed, sampler, single=single))
                print(f"    {file} {attention} {sampler}: {error:.1e}")
                worst = max(worst, error)
    assert worst < 1e-4, f"{worst:.2e} (seed {seed})"
    return f"at most {worst:.1e} apart"


@case
def lora_changes_as_merged_weights_do(server: Server) -> str:
    seed = fresh_seed()
    lines = []
    for file in ("t2v-tiny.pth", "t2v-tiny-quant.pth"):
        net = load_transformer(golden_file(file), attention="original")
        adapter, changes = random_lora(net, seed)
        save_file(adapter, server.models("loras") / "probe.safetensors")
        merged, unchanged = (in_floats(file, {name: s * each for name, each in changes.items()}) for s in (0.7, 0.0))
        plain = recorded(seed, file, "original", "euler", 1)
        loaded = changed(plain, "sample", model=["lora", 0])
        loaded["lora"] = node(
            "LoraLoaderModelOnly", model=["model", 0], lora_name="probe.safetensors", strength_model=0.7
        )
        base, patched = kept(server, plain), kept(server, loaded)
        again = kept(server, {**plain, "grid": node("TurboWanSigmas", num_steps=1, sigma_max=80.0, boundary=0.8)})
        assert torch.equal(base, again), f"{file}: without the LoRA the result is not what it was"
        effect, error = apart(patched, base), apart(patched, ours(merged, seed, "euler", 1))
        precision = apart(base, ours(unchanged, seed, "euler", 1))  # of 8 bits against the same weights in floats
        lines.append(f"{file}: changed by {effect:.1%}, off by {error:.1e}, without LoRA by {precision:.1e}")
        print(f"    {lines[-1]}")
        assert effect > 5 * error, f"{lines[-1]} (seed {seed})"
        assert error < 1.2 * precision + 1e-5, f"{lines[-1]} (seed {seed})"
    return "; ".join(lines)


def start_picture(server: Server, width: int = 128, height: int = 96) -> np.ndarray:
    """A red disc on blue in the input folder, as start.png."""
    y, x = np.mgrid[:height, :width]
    disc = (x - width / 3) ** 2 + (y - height / 2) ** 2 < (height / 5) ** 2
    picture = np.where(disc[..., None], (220, 30, 30), (30, 40, 220)).astype(np.uint8)
    Image.fromarray(picture).save(server.base / "input" / "start.png")
    return picture


def shown(outputs: dict, server: Server, key: str = "save") -> np.ndarray:
    return read_frames(server.file(outputs[key]["images"][0]))


@case
def image_to_video_keeps_the_first_frame(server: Server) -> str:
    picture = start_picture(server)
    frames = shown(server.run(image_to_video(fresh_seed())), server)
    assert frames.shape == (9, 96, 128, 3), frames.shape
    error = np.abs(frames[0].astype(float) - picture).mean()
    assert error < 12, f"first frame is {error:.1f} of 255 away from the picture"
    return f"first frame {error:.1f} of 255 away"


@case
def nodes_equal_the_engine(server: Server) -> str:
    """Loader, text encoder, sampler and VAE as nodes against `Engine.generate` with the same seed, pixel by pixel."""
    picture, worst = start_picture(server), []
    prompts = {"tiny": "a green square moves up on a white background", "tiny-i2v": "the camera pans left"}
    for model, prompt in prompts.items():
        seed, image = fresh_seed(), "i2v" in model
        size = {"width": 128, "height": 96, "num_frames": 9}
        request = turbowan.GenerateRequest(prompt, image=picture if image else None, seed=seed, sla_topk=0.7, **size)
        wanted = turbowan.Engine.load(model, device="cpu").generate(request).frames
        names = (f"{model}-high", f"{model}-low") if image else (model, "none")
        graph = {
            "pair": node("TurboWanVideoLoader", model_name=names[0], low_noise_model_name=names[1], sla_topk=0.7),
            "clip": node("TurboWanTextEncoderLoader", text_encoder="tiny"),
            "text": node("CLIPTextEncode", clip=["clip", 0], text=prompt),
            "vae": node("TurboWanVAELoader", vae_name="tiny"),
            "latent": node("TurboWanVideoSampler", model=["pair", 0], positive=["text", 0], seed=seed, **size),
            "frames": node("VAEDecode", samples=["latent", 0], vae=["vae", 0]),
            "save": node("SaveImage", images=["frames", 0], filename_prefix="pixels"),
        }
        if image:
            graph["image"] = node("LoadImage", image="start.png")
            graph = changed(graph, "latent", vae=["vae", 0], image=["image", 0])
        files = [server.file(each) for each in server.run(graph)["save"]["images"]]
        got = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        assert got.shape == wanted.shape, (got.shape, wanted.shape)
        worst.append(float(np.abs(got.astype(float) - wanted).mean()))
    # SaveImage cuts off what the engine rounds: half a level on average. A picture's latent comes back from ComfyUI's
    # un-normalised form with another last digit, which layers in 8 bits make visible.
    assert worst[0] < 0.7, f"text to video: {worst[0]:.2f} of 255 apart on average"
    assert worst[1] < 1.5, f"image to video: {worst[1]:.2f} of 255 apart on average"
    return f"text to video {worst[0]:.3f}, image to video {worst[1]:.3f} of 255 apart on average"


@case
def all_image_to_video_nodes_agree(server: Server) -> str:
    """The same seed, picture and prompt through the all-in-one node, through prepare + dual sampler, and through the
    video sampler give the same frames."""
    start_picture(server)
    seed, steps = fresh_seed(), 2
    loaders = {key: node("TurboWanModelLoader", model_name=f"tiny-i2v-{key}", sla_topk=0.7) for key in ("high", "low")}
    common = {"num_steps": steps, "boundary": 0.9, "seed": seed, "use_ode": True, "sigma_max": 200.0}
    size = {"width": 128, "height": 96, "num_frames": 9}
    prompt = "the red circle moves right"
    image, vae = node("LoadImage", image="start.png"), node("TurboWanVAELoader", vae_name="tiny")
    whole = {
        "image": image,
        "frames": node(
            "TurboDiffusionI2V", high_noise_model="tiny-i2v-high", low_noise_model="tiny-i2v-low", vae="tiny",
            text_encoder="tiny", start_image=["image", 0], prompt=prompt, negative_prompt="", attention_type="sla",
            sla_topk=0.7, **common, **size,
        ),
    }  # fmt: skip
    parts = {
        "image": image, "vae": vae, **loaders,
        "told": node(
            "TurboWanI2VPrepare", text_encoder="tiny", vae_path="tiny", start_image=["image", 0],
            positive_prompt=prompt, negative_prompt="", **size,
        ),
        "latent": node(
            "TurboWanDualExpertSampler", high_noise_model=["high", 0], low_noise_model=["low", 0],
            latent=["told", 1], conditioning=["told", 0], **common,
        ),
        "frames": node("VAEDecode", samples=["latent", 0], vae=["vae", 0]),
    }  # fmt: skip
    pair = {
        "image": image, "vae": vae,
        "pair": node("WanVideoLoader", model_name="tiny-i2v-high", low_noise_model_name="tiny-i2v-low", sla_topk=0.7),
        "clip": node("TurboWanTextEncoderLoader", text_encoder="tiny"),
        "text": node("CLIPTextEncode", clip=["clip", 0], text=prompt),
        "latent": node(
            "WanVideoSampler", model=["pair", 0], positive=["text", 0], vae=["vae", 0], image=["image", 0],
            **common, **size,
        ),
        "frames": node("VAEDecodeTiled", samples=["latent", 0], vae=["vae", 0], tile_size=512, overlap=64,
                       temporal_size=64, temporal_overlap=8),
    }  # fmt: skip
    save = node("TurboDiffusionSaveVideo", frames=["frames", 0], filename_prefix="same", fps=16, format="mp4")
    first, *others = (shown(server.run({**graph, "save": save}), server) for graph in (whole, parts, pair))
    worst = max(float(np.abs(first.astype(float) - other).mean()) for other in others)
    assert worst < 0.5, f"{worst:.2f} of 255 apart (seed {seed})"
    return f"at most {worst:.3f} of 255 apart"


@case
def core_nodes_take_our_types(server: Server) -> str:
    """KSampler with guidance on the undistilled model, KSamplerAdvanced over two experts, patches and wrappers."""
    start_picture(server)
    graph = text_to_video(fresh_seed())
    graph["model"] = node("TurboWanModelLoader", model_name="tiny-base", attention_type="original")
    graph["shift"] = node("ModelSamplingSD3", model=["model", 0], shift=8.0)
    graph["cached"] = node(
        "EasyCache", model=["shift", 0], reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False
    )
    graph["avoid"] = node("CLIPTextEncode", clip=["clip", 0], text="")
    graph["sample"] = node(
        "KSampler", model=["cached", 0], seed=fresh_seed(), steps=8, cfg=3.0, sampler_name="uni_pc", scheduler="simple",
        positive=["text", 0], negative=["avoid", 0], latent_image=["empty", 0], denoise=1.0,
    )  # fmt: skip
    frames = shown(server.run(graph), server)
    assert frames.shape == (9, 96, 128, 3)
    advanced = image_to_video(0)
    advanced["told"] = node(
        "TurboWanSampler", positive=["text", 0], negative=["text", 0], vae=["vae", 0], start_image=["image", 0],
        width=128, height=96, length=9, batch_size=1,
    )  # fmt: skip
    halves = (("sample1", "high", ["told", 2], 0, 2), ("sample", "low", ["sample1", 0], 2, 4))
    for key, model, latent, first, last in halves:
        advanced[f"shift-{model}"] = node("ModelSamplingSD3", model=[model, 0], shift=8.0)
        advanced[key] = node(
            "KSamplerAdvanced", model=[f"shift-{model}", 0], add_noise="enable" if first == 0 else "disable",
            noise_seed=42, steps=4, cfg=1.0, sampler_name="euler", scheduler="simple", positive=["told", 0],
            negative=["told", 1], latent_image=latent, start_at_step=first, end_at_step=last,
            return_with_leftover_noise="enable" if first == 0 else "disable",
        )  # fmt: skip
    advanced["frames"] = node("VAEDecode", samples=["sample", 0], vae=["vae", 0])
    advanced["save"]["inputs"]["frames"] = ["frames", 0]
    assert shown(server.run(advanced), server).shape == (9, 96, 128, 3)
    core = {key: advanced[key] for key in ("clip", "text", "vae", "image")}
    core["told"] = node(
        "WanImageToVideo", positive=["text", 0], negative=["text", 0], vae=["vae", 0], start_image=["image", 0],
        width=128, height=96, length=9, batch_size=1,
    )  # fmt: skip
    core |= {key: image_to_video(0)[key] for key in ("high", "low")}
    core["latent"] = node(
        "TurboWanDualExpertSampler", high_noise_model=["high", 0], low_noise_model=["low", 0], latent=["told", 2],
        conditioning=["told", 0], num_steps=1, boundary=0.9, seed=1, use_ode=True, sigma_max=200.0,
    )  # fmt: skip
    core["frames"] = node("VAEDecode", samples=["latent", 0], vae=["vae", 0])
    core["save"] = node("TurboDiffusionSaveVideo", frames=["frames", 0], filename_prefix="core", fps=8, format="gif")
    assert server.run(core)["save"]["images"]
    return "KSampler, KSamplerAdvanced, ModelSamplingSD3, EasyCache, WanImageToVideo"


@case
def core_loaders_and_ours_agree(server: Server) -> str:
    """A plain Wan file and a Wan 2.1 VAE of the only width that ComfyUI knows, through both loaders: the same latent
    from both kinds of sampler, the same pixels."""
    seed = fresh_seed()
    torch.manual_seed(seed)
    save_file(plain_wan(128, 2, 4096), server.models("diffusion_models") / "plain.safetensors")
    save_file(plain_vae(96), server.models("vae") / "plain_vae.safetensors")
    save_file({"text": torch.randn(1, 512, 4096)}, server.base / "input" / "wide.safetensors")
    start_picture(server, 96, 64)
    graph = {
        "theirs": node("UNETLoader", unet_name="plain.safetensors", weight_dtype="default"),
        "ours": node("TurboWanModelLoader", model_name="plain.safetensors", attention_type="original"),
        "their_vae": node("VAELoader", vae_name="plain_vae.safetensors"),
        "our_vae": node("TurboWanVAELoader", vae_name="plain_vae.safetensors"),
        "text": node("ProbeConditioning", file="wide.safetensors", key="text"),
        "grid": node("TurboWanSigmas", num_steps=2, sigma_max=80.0, boundary=0.9),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "empty": node("EmptyHunyuanLatentVideo", width=96, height=64, length=5, batch_size=1),
        "image": node("LoadImage", image="start.png"),
        "frames": node("RepeatImageBatch", image=["image", 0], amount=5),
    }
    for name in ("their", "our"):
        model = {"their": "theirs", "our": "ours"}[name]
        graph |= {
            f"{name}_sample": changed({"s": sample_custom(seed, "grid")}, "s", model=[model, 0])["s"],
            f"{name}_steps": node(
                "TurboWanVideoSampler", model=[model, 0], positive=["text", 0], width=96, height=64, num_frames=5,
                num_steps=2, sigma_max=80.0, seed=seed, use_ode=True,
            ),
            f"{name}_latent": node("VAEEncode", pixels=["frames", 0], vae=[f"{name}_vae", 0]),
            f"{name}_frames": node("VAEDecode", samples=["our_sample", 0], vae=[f"{name}_vae", 0]),
            f"{name}_pictures": node("SaveImage", images=[f"{name}_frames", 0], filename_prefix=f"{name}"),
        }  # fmt: skip
        for kind in ("sample", "steps", "latent"):
            graph[f"{name}_{kind}_kept"] = node("SaveLatent", samples=[f"{name}_{kind}", 0], filename_prefix=f"{name}")
    outputs = server.run(graph)

    def latent(key: str) -> torch.Tensor:
        return load_file(server.file(outputs[key]["latents"][0]))["latent_tensor"]

    errors = {k: apart(latent(f"our_{k}_kept"), latent(f"their_{k}_kept")) for k in ("sample", "steps", "latent")}
    errors["samplers"] = apart(latent("our_steps_kept"), latent("our_sample_kept"))
    pictures = [
        [np.asarray(Image.open(server.file(each)), np.int16) for each in outputs[f"{name}_pictures"]["images"]]
        for name in ("our", "their")
    ]
    levels = int(np.abs(np.stack(pictures[0]) - np.stack(pictures[1])).max())
    assert max(errors.values()) < 1e-4, f"{errors} (seed {seed})"
    assert levels <= 1, f"pixels {levels} levels apart (seed {seed})"
    return ", ".join(f"{name} {error:.0e}" for name, error in errors.items()) + f", pixels {levels} of 255 apart"


@case
def other_nodes_may_replace_blocks(server: Server) -> str:
    plain = recorded(fresh_seed(), "t2v-tiny.pth", "sla", "euler", 1)
    base = kept(server, plain)
    results = []
    for skip in (False, True):
        graph = changed(plain, "sample", model=["patched", 0])
        graph["patched"] = node("ProbeBlock", model=["model", 0], skip=skip)
        results.append(apart(kept(server, graph), base))
    assert results[0] < 1e-6, f"a block replaced by itself: {results[0]:.1e} apart"
    assert results[1] > 1e-3, "a block that is left out changes nothing"
    return f"by itself {results[0]:.0e} apart, left out {results[1]:.0e}"


@case
def installed_by_the_command_the_nodes_are_the_same(server: Server) -> str:
    with Server(server.comfy, server.python, installed=True) as other:
        contract(other)
        module = other.get("/object_info/TurboWanSigmas")["TurboWanSigmas"]["python_module"]
        shown(other.run(text_to_video(fresh_seed())), other)
    return module


@case
def memory_manager_sees_all_weights(server: Server) -> str:
    """8-bit layers and LoRAs on them, whole, in part and streamed: the same results, nothing hidden from ComfyUI."""
    lines = []
    for file in ("t2v-tiny.pth", "t2v-tiny-quant.pth"):
        adapter, _ = random_lora(load_transformer(golden_file(file)), fresh_seed())
        lora = server.base / "lora.safetensors"
        save_file(adapter, lora)
        command = [server.python, HERE / "partial_load.py", server.comfy, golden_file(file), lora]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"    {file}: {found}")
        assert abs(found["size"] / found["bytes"] - 1) < 0.01, "ComfyUI counts other bytes than there are"
        assert found["buffers"] == 0, "weights in buffers are not counted as layers"
        assert found["left_behind"] > 0.3 * found["size"], "nothing stays on the host when asked to"
        assert found["cast"] > 10, "no layer is lent"
        assert found["lora"] > 0.01, "the LoRA changes nothing"
        assert found["freed"] > 0.4 * found["size"], "little was freed"
        for name in ("in_part", "lora_in_part", "lora_after_unload", "after", "layerwise", "converted"):
            assert found[name] < 1e-5, f"{name}: {found[name]:.1e} apart"
        assert found["layerwise_loaded"] < 0.1 * found["size"], "layerwise_gpu loads the model"
        assert found["codecs"], "codes do not come back from the numbers they stand for"
        assert found["freed_at_once"], "a model outlives its last reference"
        assert found["layerwise_clone"], "a clone forgets that it is layerwise_gpu"
        assert found["shared"], "two loaders of one file hold two copies"
        lines.append(f"{found['size'] / 2**20:.1f} MiB")
    return f"plain {lines[0]}, int8 {lines[1]}, all counted"


@case
def an_interrupt_stops_within_a_block(server: Server) -> str:
    graph = text_to_video(fresh_seed())
    graph["empty"] = node("EmptyHunyuanLatentVideo", width=384, height=256, length=33, batch_size=1)
    graph["grid"] = node("TurboWanSigmas", num_steps=1, sigma_max=80.0, boundary=0.9)
    graph["sample"]["inputs"]["latent_image"] = ["empty", 0]
    keep = {**{k: v for k, v in graph.items() if k not in ("frames", "save")}}
    keep["keep"] = node("SaveLatent", samples=["sample", 0], filename_prefix="latents/kept")
    started = time.monotonic()
    server.run(keep)
    step = time.monotonic() - started
    prompt = server.submit(changed(keep, "sample", noise_seed=fresh_seed()))
    time.sleep(step / 3)
    asked = time.monotonic()
    server.post("/interrupt", {})
    try:
        server.wait(prompt)
        raise AssertionError("it ran to its end")
    except Interrupted:
        took = time.monotonic() - asked
    assert took < step / 3, f"stopped after {took:.2f} s of a step of {step:.2f} s in 6 blocks"
    server.run(text_to_video(fresh_seed()))
    return f"a step of {step:.1f} s in 6 blocks stopped after {took:.2f} s; the next prompt ran"


@case
def twenty_prompts_leave_memory_flat(server: Server) -> str:
    sizes = []
    for i in range(20):
        colour = "red" if i % 2 else "green"
        server.run(text_to_video(fresh_seed(), f"a {colour} square moves up on a white background"))
        sizes.append(server.memory())
    growth = (sizes[-1] - sizes[7]) / 2**20
    assert growth < 40, f"{growth:.0f} MiB more after 20 prompts than after 8: {[s >> 20 for s in sizes]}"
    return f"{growth:+.0f} MiB from the 8th to the 20th, {sizes[-1] / 2**30:.2f} GiB"


def refusal(server: Server, graph: Graph) -> str:
    """What the server says to a graph; nothing where it ran."""
    try:
        server.run(graph)
    except (Failed, Refused) as error:
        return str(error)
    return ""


@case
def bad_input_is_refused_by_name(server: Server) -> str:
    start_picture(server)
    before = {path for path in server.base.rglob("*") if path.is_file()}
    video, picture = text_to_video(1), image_to_video(1)
    prepared = {
        "image": picture["image"],
        "told": node(
            "TurboWanI2VPrepare", text_encoder="tiny", vae_path="tiny", start_image=["image", 0], positive_prompt="  ",
            negative_prompt="", width=128, height=96, num_frames=9,
        ),
        "frames": node("PreviewAny", source=["told", 0]),
    }  # fmt: skip
    (server.models("diffusion_models") / "a_vae.safetensors").symlink_to(TINY / "vae.safetensors")

    wrong: list[tuple[str, Graph, tuple[str, ...]]] = [
        ("a missing file", changed(video, "model", model_name="none.pth"), ("model_name", "none.pth")),
        ("a missing VAE", changed(video, "vae", vae_name="none.pth"), ("vae_name", "none.pth")),
        ("a VAE as model", changed(video, "model", model_name="a_vae.safetensors"), ("model_name", "VAE")),
        ("SLA on a dense file", changed(video, "model", model_name="tiny-base"), ("model_name", "SLA")),
        ("interchanged experts",
         changed(picture, "sample", high_noise_model=["low", 0], low_noise_model=["high", 0]),
         ("high_noise_model", "interchanged")),
        ("a text-to-video expert", changed(picture, "high", model_name="tiny"), ("high_noise_model", "36", "16")),
        ("text of another width", changed(picture, "text", text="x") | {
            "text": node("ProbeConditioning", file="t2v-tiny.io.safetensors", key="context")},
         ("conditioning", "96", "128")),
        ("an empty prompt", prepared, ("positive_prompt", "empty")),
        ("a size off the grid", changed(prepared, "told", positive_prompt="x", width=130), ("width", "130", "128")),
        ("a path out of the folder", changed(video, "save", filename_prefix="../x"), ("filename_prefix", "../x")),
        ("an absolute path", changed(video, "save", filename_prefix="/tmp/x"), ("filename_prefix", "/tmp/x")),
    ]  # fmt: skip
    for what, graph, words in wrong:
        said = refusal(server, graph)
        missing = [word for word in words if word not in said]
        assert not missing, f"{what}: {missing} not in: {said or 'nothing, it was taken'}"
        print(f"    {what}: {said[:170]}")
        server.get("/system_stats")
    rounded = shown(server.run(changed(picture, "sample", num_frames=11, num_steps=1)), server)
    assert len(rounded) == 9, len(rounded)
    start_picture(server, 131, 77)
    assert shown(server.run(changed(picture, "sample", num_steps=1, seed=5)), server).shape == (9, 96, 128, 3)
    (server.models("diffusion_models") / "sub").mkdir(exist_ok=True)
    (server.models("diffusion_models") / "sub" / "t2v.safetensors").symlink_to(TINY / "transformer.safetensors")
    server.run(changed(changed(video, "model", model_name="sub\\t2v.safetensors"), "save", filename_prefix="a\\b"))
    new = {path for path in server.base.rglob("*") if path.is_file()} - before
    videos = [path for path in new if path.suffix in (".mp4", ".webm", ".gif")]
    stray = [path for path in videos if not path.is_relative_to(server.base / "output")]
    assert not stray, stray
    return f"{len(wrong)} refusals; odd sizes, 4n+3 frames and foreign separators taken"


def fresh_seed() -> int:
    return int(torch.randint(1 << 31, (), generator=SEEDS))


SEEDS = torch.Generator()


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--seed", type=int, help="repeat the seeds of an earlier run")
    args = options.parse_args()
    if args.folder is None:
        print("SKIPPED: no ComfyUI given; name its folder to run our nodes in it")
        return 0
    seed = args.seed if args.seed is not None else SEEDS.seed()
    SEEDS.manual_seed(seed)
    print(f"seed {seed}")
    with Server(args.folder.resolve(), args.python or python_of(args.folder)) as server:
        for name in ("t2v-tiny.pth", "t2v-tiny-quant.pth"):
            (server.models("diffusion_models") / name).symlink_to(golden_file(name))
        (server.base / "input" / "t2v-tiny.io.safetensors").symlink_to(GOLDEN / "t2v-tiny.io.safetensors")
        return 1 if case.run(server, server, only=args.k) else 0


if __name__ == "__main__":
    sys.exit(main())
