"""Our nodes in a real, unmodified ComfyUI: `python tests/comfy/run_real.py FOLDER [--python PYTHON] [-k WORD]`.

FOLDER is ComfyUI's; PYTHON has its packages (by default FOLDER/../venv/bin/python, else this one). The embedded models
and the recorded cases of `tests/golden` are all it needs. Each case prints one line; the exit status is 1 where one
fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from real_cases import Cases, parser
from real_server import HERE, REPOSITORY, Server, python_of
from safetensors.torch import save_file

sys.path.insert(0, str(REPOSITORY))

import real_beside
import real_conditions
import real_equal
import real_loras
from real_files import VAE, write_whole_vae
from real_graphs import Graph, changed, image_to_video, node, recorded, text_to_video
from real_inputs import ASSETS, SEEDS, fresh_seed, start_picture
from real_reference import GOLDEN, apart, golden_file, kept, random_lora, refusal
from real_seen import shape_seen, shown

from turbowan.checkpoints import load_transformer

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
def text_to_video_shows_what_was_asked_for(server: Server) -> str:
    """With sla_topk left at its default, which the embedded model replaces by its own."""
    seed = fresh_seed()
    graph = changed(text_to_video(seed), "empty", width=256, height=160, length=33)
    graph["model"] = node("TurboWanModelLoader", model_name="tiny")
    frames = shown(server.run(graph), server)
    assert frames.shape == (33, 160, 256, 3), frames.shape
    seen = shape_seen(frames)
    assert list(seen.values()) == ["red", "circle", "right", "blue", "plain"], f"{seen} (seed {seed})"
    return " ".join(seen.values())


@case
def image_to_video_keeps_the_first_frame(server: Server) -> str:
    picture = start_picture(server)
    frames = shown(server.run(image_to_video(fresh_seed())), server)
    assert frames.shape == (9, 96, 128, 3), frames.shape
    error = np.abs(frames[0].astype(float) - picture).mean()
    assert error < 12, f"first frame is {error:.1f} of 255 away from the picture"
    seen = shape_seen(frames)
    assert (seen.get("colour"), seen.get("background")) == ("red", "blue"), f"{seen}, in the picture red on blue"
    return f"first frame {error:.1f} of 255 away, {seen['colour']} on {seen['background']} stays"


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
    with Server(server.comfy, server.python, server.flags, True, server.device) as other:
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
        assert found["lora_layers"] < 1e-5, f"a layer with a LoRA is {found['lora_layers']:.1e} off"
        assert found["freed"] > 0.4 * found["size"], "little was freed"
        novram = ("novram", "novram_lora")
        for name in ("in_part", "lora_in_part", "lora_after_unload", "after", "layerwise", "converted", *novram):
            assert found[name] < 1e-5, f"{name}: {found[name]:.1e} apart"
        assert max(found[f"{name}_loaded"] for name in novram) < 0.1 * found["size"], "--novram loads the model"
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
    step, _ = server.timed(keep)
    took = server.interrupted(changed(keep, "sample", noise_seed=fresh_seed()), step / 3)
    assert took < step / 3, f"stopped after {took:.2f} s of a step of {step:.2f} s in 6 blocks"
    server.run(text_to_video(fresh_seed()))
    return f"a step of {step:.1f} s in 6 blocks stopped after {took:.2f} s; the next prompt ran"


@case
def an_interrupt_stops_the_vae_within_a_layer(server: Server) -> str:
    """Of true size, while it encodes a start picture: one call, most of whose time a few layers take."""
    write_whole_vae(server.models("vae"))
    start_picture(server, 640, 480)
    graph = {
        "vae": node("TurboWanVAELoader", vae_name=VAE),
        "image": node("LoadImage", image="start.png"),
        "latent": node("VAEEncode", pixels=["image", 0], vae=["vae", 0]),
        "keep": node("SaveLatent", samples=["latent", 0], filename_prefix="latents/encoded"),
    }
    whole, _ = server.timed(graph)
    start_picture(server, 640, 488)
    took = server.interrupted(graph, whole / 3)
    assert took < whole / 3, f"stopped after {took:.1f} s of {whole:.1f}"
    return f"a picture of 640x480 takes {whole:.1f} s, stopped after {took:.1f} s"


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
    (server.models("diffusion_models") / "a_vae.safetensors").symlink_to(ASSETS / "tiny" / "vae.safetensors")

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
    sub = server.models("diffusion_models") / "sub"
    sub.mkdir(exist_ok=True)
    (sub / "t2v.safetensors").symlink_to(ASSETS / "tiny" / "transformer.safetensors")
    server.run(changed(changed(video, "model", model_name="sub\\t2v.safetensors"), "save", filename_prefix="a\\b"))
    new = {path for path in server.base.rglob("*") if path.is_file()} - before
    videos = [path for path in new if path.suffix in (".mp4", ".webm", ".gif")]
    stray = [path for path in videos if not path.is_relative_to(server.base / "output")]
    assert not stray, stray
    return f"{len(wrong)} refusals; odd sizes, 4n+3 frames and foreign separators taken"


@case
def comfyui_reports_no_leak(server: Server) -> str:
    """Of all that ran before."""
    assert not server.leaks(), server.leaks()
    return "no line of the log"


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--seed", type=int, help="repeat the seeds of an earlier run")
    options.add_argument("--beside", type=Path, action="append", default=[], help="a folder of another pack's nodes")
    args = options.parse_args()
    if args.folder is None:
        print("SKIPPED: no ComfyUI given; name its folder to run our nodes in it")
        return 0
    real_beside.PACKS.extend(pack.resolve() for pack in args.beside)
    seed = args.seed if args.seed is not None else SEEDS.seed()
    SEEDS.manual_seed(seed)
    print(f"seed {seed}")
    with Server(args.folder, args.python or python_of(args.folder), args.flag) as server:
        for name in ("t2v-tiny.pth", "t2v-tiny-quant.pth"):
            (server.models("diffusion_models") / name).symlink_to(golden_file(name))
        (server.base / "input" / "t2v-tiny.io.safetensors").symlink_to(GOLDEN / "t2v-tiny.io.safetensors")
        every = Cases([*real_equal.case, *real_loras.case, *real_conditions.case, *real_beside.case, *case])
        return 1 if every.run(server, server, only=args.k) else 0


if __name__ == "__main__":
    sys.exit(main())
