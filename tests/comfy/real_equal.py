"""What comes out of the nodes against our engine, and against ComfyUI's own nodes."""

from __future__ import annotations

import shutil

import numpy as np
import torch
from PIL import Image
from real_cases import Cases
from real_graphs import RECORDED_SHAPE, Graph, changed, node, recorded, sample_custom, text_to_video
from real_inputs import EMBEDDED, expanded, fresh_seed, start_picture
from real_reference import (
    apart,
    calls,
    golden_file,
    kept,
    ours,
    plain_vae,
    plain_wan,
    probed,
    step_of_ours,
    velocity_of_ours,
)
from real_seen import shown
from real_server import Server
from safetensors.torch import load_file, save_file

import turbowan
from turbowan.checkpoints import load_transformer
from turbowan.sampling import noise, rcm

case = Cases()


@case
def core_samplers_equal_the_engine(server: Server) -> str:
    """Recorded official checkpoints through SamplerCustom on TurboWanSigmas.

    ComfyUI keeps its state in float32, the engine in float64. In floats that is all the difference to the end. Layers
    in 8 bits turn it, where the last digit crosses a rounding boundary, into half a percent; so what is held to the
    same bar there is every step: the engine's own, taken from the values that ComfyUI's sampler had come to.
    """
    steps, ends, seed = [0.0], {"t2v-tiny.pth": 0.0, "t2v-tiny-quant.pth": 0.0}, fresh_seed()
    files = {"t2v-tiny.pth": ("original", "sla"), "t2v-tiny-quant.pth": ("sla", "sagesla")}
    times = rcm.timesteps(4, 80.0)
    for file, kinds in files.items():
        for attention in kinds:
            net = load_transformer(golden_file(file), attention=attention, sla_topk=0.25)
            for sampler in ("euler", "lcm"):
                name = f"{file[:-4]}-{attention}-{sampler}"
                got = kept(server, probed(recorded(seed, file, attention, sampler), "sample", "model", name))
                made = calls(server, name)
                states = [call["x"] for call in made] + [got]
                assert torch.equal(states[0], noise.draw(RECORDED_SHAPE, 1, seed)[0] * times[0].float())
                errors = [
                    apart(states[i + 1], step_of_ours(net, made[i], times[i : i + 2], seed, i, sampler == "euler"))
                    for i in range(4)
                ]
                steps.append(max(errors))
                end = apart(got, ours(net, seed, sampler))
                ends[file] = max(ends[file], end)
                print(f"    {name}: at most {max(errors):.1e} in a step, {end:.1e} at the end")
    assert max(steps) < 1e-4, f"{max(steps):.2e} in a step (seed {seed})"
    assert ends["t2v-tiny.pth"] < 1e-4, f"{ends} at the end (seed {seed})"
    whole, eight_bits = ends.values()
    return f"at most {max(steps):.1e} in a step; at the end {whole:.1e} in floats, {eight_bits:.1e} in 8 bits"


def pair_graph(model: str, prompt: str, seed: int, floats: bool = False) -> Graph:
    """Our loaders, video sampler and VAE on an embedded model; SaveLatent keeps what the sampler made."""
    size, image = {"width": 128, "height": 96, "num_frames": 9}, "i2v" in model
    names = (f"{model}-high", f"{model}-low") if image else (model, "none")
    if floats:
        names = tuple(name if name == "none" else f"{name}-floats.safetensors" for name in names)
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
        graph = changed(graph, "latent", vae=["vae", 0], image=["image", 0], low_noise_model=["pair", 1])
    return graph


PROMPTS = {"tiny": "a green square moves up on a white background", "tiny-i2v": "the camera pans left"}


@case
def nodes_equal_the_engine(server: Server) -> str:
    """Loader, text encoder, sampler and VAE as nodes against `Engine.generate` with the same seed, pixel by pixel: the
    embedded models with their layers in floats."""
    picture, lines = start_picture(server), []
    for model, prompt in PROMPTS.items():
        seed, image = fresh_seed(), "i2v" in model
        roles = {"high_noise": "tiny-i2v-high", "low_noise": "tiny-i2v-low"} if image else {"transformer": "tiny"}
        files = {role: expanded(server, name) for role, name in roles.items()}
        request = turbowan.GenerateRequest(
            prompt, image=picture if image else None, seed=seed, sla_topk=0.7, width=128, height=96, num_frames=9
        )
        wanted = turbowan.Engine.load(model, **files, device="cpu").generate(request).frames
        saved = server.run(pair_graph(model, prompt, seed, floats=True))["save"]["images"]
        got = np.stack([np.asarray(Image.open(server.file(each)).convert("RGB")) for each in saved])
        assert got.shape == wanted.shape, (got.shape, wanted.shape)
        # SaveImage cuts off what the engine rounds: a pixel is the same or one lower
        lower = wanted.astype(int) - got
        other = ((lower < 0) | (lower > 1)).mean()
        lines.append(f"{model} {other:.4%} of the pixels")
        assert other < 1e-3, f"{lines[-1]} are not the engine's (seed {seed})"
    return "other than the engine's: " + ", ".join(lines)


@case
def every_call_of_an_8_bit_model_equals_the_engines(server: Server) -> str:
    """The embedded models as they are: what each evaluation makes of its input, in ComfyUI and in the engine."""
    start_picture(server)
    worst, count = 0.0, 0
    for model, prompt in PROMPTS.items():
        names = ("tiny-i2v-high", "tiny-i2v-low") if "i2v" in model else ("tiny",)
        graph = pair_graph(model, prompt, fresh_seed())
        for slot, (name, link) in enumerate(zip(names, ("model", "low_noise_model"), strict=False)):
            graph = probed(graph, "latent", link, f"whole-{name}", ["pair", slot])
        server.run(graph)
        for name in names:
            net = load_transformer(EMBEDDED[name], sla_topk=0.7)
            made = calls(server, f"whole-{name}")
            assert made, f"{name} was never called"
            count += len(made)
            worst = max(worst, *(apart(call["out"], velocity_of_ours(net, call)) for call in made))
    assert count == 8, f"{count} evaluations, not 4 of each model"
    assert worst < 1e-5, f"{worst:.1e}"
    return f"{count} evaluations, at most {worst:.1e} apart"


@case
def a_compiled_model_gives_the_same(server: Server) -> str:
    """TorchCompileModel leaves no rounding out: the sampler's are 4 of 1000 in the timestep."""
    if shutil.which("g++") is None:
        return "left out: torch.compile needs g++ on a CPU"
    expanded(server, "tiny")
    graph = changed(text_to_video(fresh_seed()), "model", model_name="tiny-floats.safetensors")
    graph = {key: graph[key] for key in ("model", "clip", "text", "grid", "sampler", "empty", "sample")}
    graph["keep"] = node("SaveLatent", samples=["sample", 0], filename_prefix="compiled")
    graph = changed(graph, "grid", num_steps=2)
    graph["compiled"] = node("TorchCompileModel", model=["model", 0], backend="inductor")
    error = apart(kept(server, changed(graph, "sample", model=["compiled", 0])), kept(server, graph))
    assert error < 2e-3, f"{error:.1e} apart"
    return f"{error:.0e} apart"


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
def first_image_to_video_models_run_with_and_without_clip_vision(server: Server) -> str:
    """Wan 2.1 image-to-video through ComfyUI's loader and through ours."""
    seed = fresh_seed()
    torch.manual_seed(seed)
    state = plain_wan(128, 2, 4096, in_dim=36, image_dim=1280)
    save_file(state, server.models("diffusion_models") / "plain_i2v.safetensors")
    text, tokens = torch.randn(1, 20, 4096), torch.randn(1, 257, 1280)
    start_picture(server, 96, 64)
    lines, results = [], []
    for name, given in {"without": {}, "with": {"clip_vision": tokens}}.items():
        save_file({"text": text, **given}, server.base / "input" / f"{name}.safetensors")
        graph = {
            "theirs": node("UNETLoader", unet_name="plain_i2v.safetensors", weight_dtype="default"),
            "ours": node("TurboWanModelLoader", model_name="plain_i2v.safetensors", attention_type="original"),
            "vae": node("TurboWanVAELoader", vae_name="tiny"),
            "image": node("LoadImage", image="start.png"),
            "plain": node("ProbeConditioning", file=f"{name}.safetensors", key="text"),
            "text": node(
                "WanImageToVideo", positive=["plain", 0], negative=["plain", 0], vae=["vae", 0],
                start_image=["image", 0], width=96, height=64, length=5, batch_size=1,
            ),
            "grid": node("TurboWanSigmas", num_steps=2, sigma_max=80.0, boundary=0.9),
            "sampler": node("KSamplerSelect", sampler_name="euler"),
            "empty": node("EmptyHunyuanLatentVideo", width=96, height=64, length=5, batch_size=1),
            "sample": sample_custom(seed, "grid"),
            "keep": node("SaveLatent", samples=["sample", 0], filename_prefix="clip"),
        }  # fmt: skip
        theirs, ours_ = (kept(server, changed(graph, "sample", model=[each, 0])) for each in ("theirs", "ours"))
        results.append(ours_)
        lines.append(f"{name} CLIP tokens {apart(ours_, theirs):.0e}")
        assert apart(ours_, theirs) < 1e-4, f"{lines[-1]} apart (seed {seed})"
    assert apart(*results) > 1e-3, "CLIP tokens change nothing"
    return ", ".join(lines)
