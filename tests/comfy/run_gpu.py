"""Our nodes in a real ComfyUI on a GPU: `python tests/comfy/run_gpu.py FOLDER [--layers N] [-k WORD] [--device cpu]`.

FOLDER is ComfyUI's. What only a GPU can show: pictures through its kernels, where weights live, ComfyUI's memory modes,
memory over many prompts, and the time and memory of a model of Wan 14B's width with N layers of random weights. Each
case prints one line; the exit status is 1 where one fails. --device cpu runs the same with small models, to try it.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from real_cases import Cases, parser, wanted
from real_graphs import Graph, changed, image_to_video, node, text_to_video
from real_server import HERE, REPOSITORY, Server, python_of
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(REPOSITORY))

import run_examples
import run_real
from real_files import VAE, write_experts, write_picture, write_sparse_umt5, write_whole_vae
from real_inputs import EMBEDDED, SEEDS, expanded, fresh_seed, start_picture
from real_reference import apart, calls, in_floats, probed, random_lora, velocity_of_ours
from real_seen import psnr

from turbowan.bench.random_weights import TRANSFORMERS
from turbowan.checkpoints import load_transformer
from turbowan.checkpoints.files import write_tensors
from turbowan.checkpoints.official import write_transformer
from turbowan.checkpoints.quantize import quantize_transformer
from turbowan.models.transformer import AttentionConfig, TransformerConfig, WanTransformer

WIDE = "wide-quant.pth"
GIB = 2**30
CARDS = (8, 12, 16, 24)  # GiB
MODES = ("comfy_native", "layerwise_gpu", "cpu_only")
PROMPTS: list[Path] = []  # published graphs, from the command line
case = Cases()


def kept(server: Server, graph: Graph, name: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """What a graph's ProbeKeep, its node `keep`, kept and showed."""
    outputs = server.run(graph)["keep"]
    (tensor,) = load_file(server.base / "output" / "kept" / f"{name}.safetensors").values()
    return tensor, outputs


def keeping(graph: Graph, name: str, **links: list) -> Graph:
    """The graph, ending in ProbeKeep instead of a file."""
    kept_as = node("ProbeKeep", name=name, **links)
    return {**{key: each for key, each in graph.items() if key != "save"}, "keep": kept_as}


def pictures(server: Server, seed: int, attention: str, mode: str) -> np.ndarray:
    graph = image_to_video(seed, width=256, height=160, num_frames=33)
    for key in ("high", "low"):
        graph = changed(graph, key, attention_type=attention, offload_mode=mode)
    return kept(server, keeping(graph, "pictures", frames=["sample", 0]), "pictures")[0].numpy()


@case
def every_offload_mode_and_attention(server: Server) -> str:
    """Both experts of the embedded image-to-video model: frames of each mode against those of comfy_native."""
    start_picture(server, 256, 160)
    seed, lines = fresh_seed(), []
    for attention, mode in itertools.product(("sla", "sagesla", "original"), MODES):
        started = time.monotonic()
        frames = pictures(server, seed, attention, mode)
        if mode == MODES[0]:
            base = frames
            assert base.std() > 10, f"{attention}: hardly anything to see"
        lines.append(f"{attention} {mode} {psnr(frames, base):.1f} dB")
        print(f"    {lines[-1]} ({time.monotonic() - started:.1f} s)", flush=True)
        assert psnr(frames, base) > (20 if mode == "cpu_only" else 45), lines[-1]
    return ", ".join(line for line in lines if "native" not in line)


@case
def memory_modes_of_comfyui(server: Server) -> str:
    """--lowvram, --novram and --highvram give the frames of the default."""
    start_picture(server, 256, 160)
    seed, lines = fresh_seed(), []
    base = pictures(server, seed, "sla", "comfy_native")
    for flag in ("--lowvram", "--novram", "--highvram") if server.device == "cuda" else ():
        with Server(server.comfy, server.python, (*server.flags, flag), device=server.device) as other:
            start_picture(other, 256, 160)
            lines.append(f"{flag} {psnr(pictures(other, seed, 'sla', 'comfy_native'), base):.1f} dB")
            print(f"    {lines[-1]}", flush=True)
            assert float(lines[-1].split()[1]) > 45, lines[-1]
    return ", ".join(lines) or "left out on a CPU"


@case
def weights_in_part_and_streamed(server: Server) -> str:
    """As `partial_load.py` tells it: relative differences from the model loaded whole."""
    lines = []
    for path in (EMBEDDED["tiny"], expanded(server, "tiny")):
        lora = server.base / "lora.safetensors"
        save_file(random_lora(load_transformer(path), fresh_seed())[0], lora)
        command = [server.python, HERE / "partial_load.py", server.comfy, path, lora, server.device]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"    {path.name}: {found}", flush=True)
        worst = max(found[key] for key in ("in_part", "after", "novram", "layerwise", "converted"))
        with_lora = max(found[key] for key in ("lora_in_part", "lora_after_unload", "novram_lora"))
        lines.append(f"{path.stem} {worst:.0e}, with a LoRA {with_lora:.0e}")
        assert worst < 1e-3, lines[-1]
        assert with_lora < 2e-2, lines[-1]
        assert found["left_behind"] > 0.3 * found["size"], found
        assert found["layerwise_loaded"] < 0.1 * found["size"], found
    return "; ".join(lines)


@case
def lora_on_8_bits(server: Server) -> str:
    """Each evaluation with LoraLoaderModelOnly against weights in floats on the CPU, the LoRA merged in."""
    adapter, changes = random_lora(load_transformer(EMBEDDED["tiny"]), fresh_seed())
    save_file(adapter, server.models("loras") / "probe.safetensors")
    lines, strength = [], 2.0
    for attention in ("original", "sla"):
        errors = []
        for part in (0.0, strength):
            name = f"lora-{attention}-{part:g}"
            graph = changed(text_to_video(fresh_seed()), "model", attention_type=attention)
            graph["lora"] = node(
                "LoraLoaderModelOnly", model=["model", 0], lora_name="probe.safetensors", strength_model=part
            )
            graph = changed(graph, "grid", num_steps=1)
            server.run(keeping(probed(graph, "sample", "model", name, ["lora", 0]), "lora", samples=["sample", 0]))
            (call,) = calls(server, name)
            how = AttentionConfig(attention, 0.8)
            net = in_floats(EMBEDDED["tiny"], changes, part, how)
            errors.append(apart(call["out"], velocity_of_ours(net, call)))
        plain = in_floats(EMBEDDED["tiny"], {}, attention=how)
        effect = apart(velocity_of_ours(plain, call), velocity_of_ours(net, call))
        lines.append(f"{attention}: changed by {effect:.1%}, off by {errors[1]:.1e} (without it {errors[0]:.1e})")
        print(f"    {lines[-1]}", flush=True)
        assert errors[1] < 2 * errors[0] + 1e-3, lines[-1]
        assert effect > 3 * errors[1], lines[-1]
    return "; ".join(lines)


@case
def ten_prompts_leave_memory_flat(server: Server) -> str:
    held = []
    for i in range(10):
        prompt = f"a {('red', 'green')[i % 2]} square moves up on a white background"
        graph = keeping(text_to_video(fresh_seed(), prompt), "flat", frames=["frames", 0])
        held.append(kept(server, graph, "flat")[1]["memory"][0]["allocated"])
    assert held[-1] - held[2] < 2**20, f"allocated after each prompt: {held}"
    return f"{held[2] / 2**20:.2f} MiB after the third, {held[-1] / 2**20:.2f} MiB after the tenth"


def config_of(device: str, layers: int) -> TransformerConfig:
    if device == "cpu":
        return TransformerConfig(dim=256, ffn_dim=512, num_layers=2, text_dim=4096, has_sla=True)
    wide = TRANSFORMERS["14B"]
    return TransformerConfig(wide.dim, wide.ffn_dim, layers, wide.text_dim, has_sla=True)


def write_wide(server: Server, layers: int) -> str:
    """Random weights in official int8 blocks, and a text for them."""
    started, device = time.monotonic(), server.device
    with torch.device(device):
        net = WanTransformer(config_of(device, layers)).to(torch.bfloat16)
    state = quantize_transformer(net.state_dict(), device)
    write_tensors(server.models("diffusion_models") / WIDE, write_transformer({k: v.cpu() for k, v in state.items()}))
    save_file({"text": torch.randn(1, 40, 4096)}, server.base / "input" / "wide.safetensors")
    del net, state
    if device == "cuda":
        torch.cuda.empty_cache()
    size = (server.models("diffusion_models") / WIDE).stat().st_size
    return f"{WIDE}: {size / GIB:.2f} GiB, written in {time.monotonic() - started:.0f} s"


def wide(server: Server, mode: str, seed: int, steps: int = 4, resolution: str = "480p") -> Graph:
    width, height, frames = {"480p": (832, 480, 81), "720p": (1280, 720, 81)}[resolution]
    if server.device == "cpu":
        width, height, frames = 128, 96, 9
    return {
        "model": node("TurboWanModelLoader", model_name=WIDE, attention_type="sagesla", offload_mode=mode),
        "text": node("ProbeConditioning", file="wide.safetensors", key="text"),
        "times": node("ProbeTimes", model=["model", 0], name=f"wide-{mode}"),
        "sample": node(
            "TurboWanVideoSampler", model=["times", 0], positive=["text", 0], width=width, height=height,
            num_frames=frames, num_steps=steps, seed=seed,
        ),
        "keep": node("ProbeKeep", samples=["sample", 0], name=f"wide-{mode}"),
    }  # fmt: skip


def told(outputs: dict[str, Any]) -> str:
    each = outputs["calls"]
    ms, peak = median(call["ms"] for call in each[1:]), max(call["peak"] for call in each)
    first, memory = each[0]["ms"], outputs["memory"][0]
    return (
        f"{ms:.1f} ms a step (first {first:.0f}), {each[-1]['before'] / GIB:.2f} GiB held, {peak / GIB:.2f} at most,"
        f" {memory['reserved'] / GIB:.2f} reserved"
    )


@case
def true_width_whole_and_streamed(server: Server) -> str:
    """A step's time and memory, everything on the GPU and block by block: the same latent."""
    seed, lines, base = fresh_seed(), [], None
    for resolution in ("480p", "720p"):
        for mode in MODES[:2]:
            kept(server, wide(server, mode, fresh_seed(), 2), f"wide-{mode}")  # loads, and chooses kernels
            got, outputs = kept(server, wide(server, mode, seed, 4, resolution), f"wide-{mode}")
            base = got if mode == MODES[0] else base
            error = apart(got, base)
            lines.append(f"{resolution} {mode}: {told(outputs)}, {error:.0e} apart")
            host = f"{server.memory() / GIB:.2f} GiB of the host, {server.peak_memory() / GIB:.2f} at most"
            print(f"    {lines[-1]}; {host}", flush=True)
            assert got.isfinite().all(), f"{mode}: not finite"
            assert error < 1e-3, lines[-1]
    return f"{len(lines)} runs"


@case
def an_interrupt_stops_within_a_block_of_true_width(server: Server) -> str:
    lines = []
    for mode in MODES[:2]:
        graph = wide(server, mode, fresh_seed(), 4, "720p")
        ms = median(call["ms"] for call in kept(server, graph, f"wide-{mode}")[1]["calls"][1:])
        unseen = changed(graph, "sample", seed=fresh_seed(), model=["model", 0])  # without waiting
        took = 1000 * server.interrupted(unseen, 1.5 * ms / 1000)
        lines.append(f"{mode} stopped after {took:.0f} ms of a step of {ms:.0f}")
        print(f"    {lines[-1]}", flush=True)
        assert took < max(ms / 2, 150), lines[-1]  # the answer itself takes up to 100
    return "; ".join(lines)


@case
def the_vae_of_true_size(server: Server) -> str:
    """Random weights: seconds, to the frames on the host, and memory of a start picture's latent and of decoding."""
    write_whole_vae(server.models("vae"))
    save_file({"text": torch.randn(1, 40, 4096)}, server.base / "input" / "wide.safetensors")
    lines = []
    sizes = {"480p": (832, 480), "720p": (1280, 720)} if server.device == "cuda" else {"small": (64, 64)}
    for name, (width, height) in sizes.items():
        graph = {
            "vae": node("TurboWanVAELoader", vae_name=VAE),
            "image": node("LoadImage", image="example.png"),
            "text": node("ProbeConditioning", file="wide.safetensors", key="text"),
            "told": node(
                "TurboWanSampler", positive=["text", 0], negative=["text", 0], vae=["vae", 0], start_image=["image", 0],
                width=width, height=height, length=81, batch_size=1,
            ),
            "keep": node("ProbeKeep", name="vae", samples=["told", 2]),
        }  # fmt: skip
        empty = node("EmptyHunyuanLatentVideo", width=width, height=height, length=81, batch_size=1)
        frames = node("VAEDecode", samples=["empty", 0], vae=["vae", 0])
        keep = node("ProbeKeep", name="vae", frames=["frames", 0])
        decoding = {"vae": graph["vae"], "empty": empty, "frames": frames, "keep": keep}
        for what, each, sized in (("start picture", graph, "told"), ("decoding", decoding, "empty")):
            server.run(changed(each, sized, length=5))  # loads, and chooses kernels
            seconds, outputs = server.timed(each)
            peak = outputs["keep"]["memory"][0]["peak"] / GIB
            lines.append(f"{name} {what} {seconds:.2f} s, {peak:.2f} GiB at most")
            print(f"    {lines[-1]}", flush=True)
    return f"{len(lines)} runs"


@case
def smaller_cards(server: Server) -> str:
    """The GPU's memory taken but for that of a smaller card: what runs, how fast, and how much is held."""
    lines = []
    for card, mode in itertools.product(CARDS if server.device == "cuda" else CARDS[:1], MODES[:2]):
        try:
            server.run({"card": node("ProbeCard", gib=float(card))})
            started = time.monotonic()
            _, outputs = kept(server, wide(server, mode, fresh_seed(), 3), f"wide-{mode}")
            line = f"{told(outputs)}; {time.monotonic() - started:.1f} s in all"
        except Exception as error:
            line = f"{type(error).__name__}: {str(error)[:200]}"
        lines.append(f"{card} GB {mode}: {line}")
        print(f"    {lines[-1]}", flush=True)
    server.run({"card": node("ProbeCard", gib=0.0)})
    return f"{len(lines)} runs"


@case
def published_graphs_at_their_own_size(server: Server) -> str:
    """Graphs of --prompts, in the API's form, with small transformers, and text encoder and VAE of true size."""
    if not PROMPTS:
        return "left out: no --prompts"
    write_experts(server.models("diffusion_models"), 4096)
    write_whole_vae(server.models("vae"))
    write_sparse_umt5(server.models("text_encoders"))
    lines = []
    for path in PROMPTS:
        graph = json.loads(path.read_text())
        (size,) = (each["inputs"] for each in graph.values() if {"num_frames", "length"} & set(each["inputs"]))
        frames = "num_frames" if "num_frames" in size else "length"
        if server.device == "cpu":
            size |= {frames: 5, "width": 64, "height": 64, **({"resolution": "custom"} if "resolution" in size else {})}
        seconds, outputs = server.timed(graph)
        count = next(len(each["images"]) for each in outputs.values() if "animated" not in each)
        assert count == size[frames], f"{path.stem}: {count} pictures, {size[frames]} expected"
        lines.append(f"{path.stem} {seconds:.1f} s for {count} frames")
        print(f"    {lines[-1]}", flush=True)
    return f"{len(lines)} graphs"


case(run_real.comfyui_reports_no_leak)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options.add_argument("--layers", type=int, default=8, help="of the model of true width (Wan 14B has 40)")
    options.add_argument("--prompts", type=Path, help="a folder of published graphs in the API's form")
    options.add_argument("--seed", type=int, help="repeat the seeds of an earlier run")
    args = options.parse_args()
    if args.folder is None or (args.device == "cuda" and not torch.cuda.is_available()):
        print(f"SKIPPED: {'no ComfyUI given; name its folder' if args.folder is None else 'no CUDA here'}")
        return 0
    if args.prompts is not None:
        PROMPTS.extend(sorted(args.prompts.glob("*.json")))
    seed = args.seed if args.seed is not None else SEEDS.seed()
    SEEDS.manual_seed(seed)
    print(f"seed {seed}")
    of_real = (
        run_real.text_to_video_shows_what_was_asked_for, run_real.image_to_video_keeps_the_first_frame,
        run_real.core_nodes_take_our_types,
    )  # fmt: skip
    every = Cases([*run_examples.cases, *of_real, *case])
    started = time.monotonic()
    with Server(args.folder, args.python or python_of(args.folder), args.flag, device=args.device) as server:
        print(f"server up after {time.monotonic() - started:.1f} s", flush=True)
        write_picture(server.base / "input")
        if any(wanted(args.k, each.__name__) for each in case if "width" in each.__name__ or "cards" in each.__name__):
            print(write_wide(server, args.layers), flush=True)
        return 1 if every.run(server, server, only=args.k) else 0


if __name__ == "__main__":
    sys.exit(main())
