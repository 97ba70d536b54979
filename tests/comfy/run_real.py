"""Our nodes in a real, unmodified ComfyUI: `python tests/comfy/run_real.py FOLDER [--python PYTHON] [-k WORD]`.

FOLDER is ComfyUI's; PYTHON has its packages (by default FOLDER/../venv/bin/python, else this one). The embedded models
and the recorded cases of `tests/golden` are all it needs. Each case prints one line; the exit status is 1 where one fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch
from real_server import HERE, REPOSITORY, Failed, Interrupted, Refused, Server
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(REPOSITORY))

from turbowan.checkpoints import load_transformer

from turbowan.models.pack import full_weight, is_linear
from turbowan.models.transformer import WanTransformer
from turbowan.models.vae import LATENT_MEAN, LATENT_STD
from turbowan.sampling import noise, rcm

GOLDEN = HERE.parent / "golden"
SHAPE = (1, 16, 5, 16, 24)  # of the recorded case's latent
CASES: list[Callable[[Server], str]] = []
Graph = dict[str, dict]


def case(function: Callable[[Server], str]) -> Callable[[Server], str]:
    CASES.append(function)
    return function


def node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


# ---------------------------------------------------------------- graphs


def text_to_video(seed: int, prompt: str = "a red circle moves right on a blue background") -> Graph:
    return {
        "model": node("TurboWanModelLoader", model_name="tiny", attention_type="sla", sla_topk=0.8),
        "clip": node("TurboWanTextEncoderLoader", text_encoder="tiny"),
        "text": node("CLIPTextEncode", clip=["clip", 0], text=prompt),
        "grid": node("TurboWanSigmas", num_steps=4, sigma_max=80.0, boundary=0.9),
        "sampler": node("KSamplerSelect", sampler_name="lcm"),
        "empty": node("EmptyHunyuanLatentVideo", width=128, height=96, length=9, batch_size=1),
        "sample": sample_custom(seed, "grid"),
        "vae": node("TurboWanVAELoader", vae_name="tiny"),
        "frames": node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "save": node("TurboDiffusionSaveVideo", frames=["frames", 0], filename_prefix="t2v", fps=16, format="mp4"),
    }


def sample_custom(seed: int, grid: str, text: str = "text") -> dict:
    return node(
        "SamplerCustom", model=["model", 0], add_noise=True, noise_seed=seed, cfg=1.0, positive=[text, 0],
        negative=[text, 0], sampler=["sampler", 0], sigmas=[grid, 0], latent_image=["empty", 0],
    )  # fmt: skip


def recorded(seed: int, model: str, attention: str, sampler: str, steps: int = 4) -> Graph:
    """The recorded transformer by ComfyUI's own sampling nodes; the latent is kept."""
    return {
        "model": node("TurboWanModelLoader", model_name=model, attention_type=attention, sla_topk=0.25),
        "text": node("ProbeConditioning", file="t2v-tiny.io.safetensors", key="context"),
        "grid": node("TurboWanSigmas", num_steps=steps, sigma_max=80.0, boundary=0.9),
        "sampler": node("KSamplerSelect", sampler_name=sampler),
        "empty": node("EmptyHunyuanLatentVideo", width=SHAPE[4] * 8, height=SHAPE[3] * 8, length=17, batch_size=1),
        "sample": sample_custom(seed, "grid"),
        "keep": node("SaveLatent", samples=["sample", 0], filename_prefix="latents/kept"),
    }


# ---------------------------------------------------------------- what to compare with


def kept(server: Server, graph: Graph) -> Tensor:
    """The latent that a graph's SaveLatent kept, normalised as ours are."""
    entry = server.run(graph)["keep"]["latents"][0]
    samples = load_file(server.file(entry))["latent_tensor"]
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (LATENT_MEAN, LATENT_STD))
    return (samples - mean) / std


def ours(net: WanTransformer, seed: int, sampler: str, steps: int = 4, single: bool = False) -> Tensor:
    """The engine's own steps with the noise that ComfyUI's nodes draw: `lcm` starts its generator anew.

    single: the state in float32 and the arithmetic in the order of ComfyUI's samplers. Layers in 8 bits turn a
    difference of the last digit, where it crosses a rounding boundary, into half a percent.
    """
    text = load_file(GOLDEN / "t2v-tiny.io.safetensors")["context"].float().reshape(1, 512, -1)
    draws = noise.draw(SHAPE, steps, seed)

    def velocity(latent: Tensor, t: float, step: int) -> Tensor:
        x, timestep = rcm.round_inputs(latent, torch.tensor(t, dtype=torch.float32) * 1000)
        return net(x, timestep.expand(1), text)

    times = rcm.timesteps(steps, 80.0)
    with torch.inference_mode():
        if not single:
            return rcm.sample(velocity, [draws[0], *draws], times, ode=sampler == "euler")
        x = times[0].float() * draws[0]
        for i, (t, t_next) in enumerate(pairwise(times.float())):
            clean = x - velocity(x, float(t), i) * t
            if sampler == "euler":
                x = x + (x - clean) / t * (t_next - t)
            else:
                x = t_next * draws[i] + (1 - t_next) * clean if t_next > 0 else clean
        return x


def read_frames(path: Path) -> np.ndarray:
    """uint8 [T, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# ---------------------------------------------------------------- cases


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
    assert red > 0.01 and blue > 0.5, f"no red circle on blue (seed {seed}): {red:.3f} red, {blue:.3f} blue"
    return f"{red:.1%} red, {blue:.1%} blue"


@case
def core_samplers_equal_the_engine(server: Server) -> str:
    worst = 0.0
    seed = fresh_seed()
    files = {"t2v-tiny.pth": ("original", "sla"), "t2v-tiny-quant.pth": ("sla", "sagesla")}
    for file, kinds in files.items():
        for attention in kinds:
            net = load_transformer(REPOSITORY_GOLDEN(file), attention=attention, sla_topk=0.25)
            for sampler in ("euler", "lcm"):
                single = file.endswith("quant.pth")
                got = kept(server, recorded(seed, file, attention, sampler))
                error = apart(got, ours(net, seed, sampler, single=single))
                print(f"    {file} {attention} {sampler}: {error:.1e}")
                worst = max(worst, error)
    assert worst < 1e-4, f"{worst:.2e} (seed {seed})"
    return f"at most {worst:.1e} apart"


def REPOSITORY_GOLDEN(name: str) -> Path:  # noqa: N802
    for folder in (REPOSITORY.parent / "shared" / "golden", GOLDEN):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(name)


@case
def lora_changes_as_merged_weights_do(server: Server) -> str:
    seed = fresh_seed()
    lines = []
    for file in ("t2v-tiny.pth", "t2v-tiny-quant.pth"):
        net = load_transformer(REPOSITORY_GOLDEN(file), attention="original")
        adapter, changes = random_lora(net, seed)
        save_file(adapter, server.models("loras") / "probe.safetensors")
        merged, unchanged = (in_floats(file, {name: s * change for name, change in changes.items()}) for s in (0.7, 0.0))
        plain = recorded(seed, file, "original", "euler", 1)
        loaded = {**plain, "lora": node("LoraLoaderModelOnly", model=["model", 0], lora_name="probe.safetensors", strength_model=0.7)}
        loaded["sample"] = {**plain["sample"], "inputs": {**plain["sample"]["inputs"], "model": ["lora", 0]}}
        base, patched = kept(server, plain), kept(server, loaded)
        again = kept(server, {**plain, "grid": node("TurboWanSigmas", num_steps=1, sigma_max=80.0, boundary=0.8)})
        assert torch.equal(base, again), f"{file}: without the LoRA the result is not what it was"
        effect, error = apart(patched, base), apart(patched, ours(merged, seed, "euler", 1))
        precision = apart(base, ours(unchanged, seed, "euler", 1))  # of 8 bits against the same weights in floats
        lines.append(f"{file}: changed by {effect:.1%}, off by {error:.1e}, without LoRA by {precision:.1e}")
        print(f"    {lines[-1]}")
        assert effect > 5 * error and error < 1.2 * precision + 1e-5, f"{lines[-1]} (seed {seed})"
    return "; ".join(lines)


def in_floats(file: str, changes: dict[str, Tensor]) -> WanTransformer:
    """The recorded transformer with linear layers in float32, the changes added."""
    net = load_transformer(REPOSITORY_GOLDEN(file), attention="original")
    for name, change in changes.items():
        layer = net.get_submodule(name)
        whole = torch.nn.Linear(change.shape[1], change.shape[0])
        whole.weight.data, whole.bias.data = full_weight(layer).float() + change, layer.bias.data
        net.set_submodule(name, whole)
    return net


def random_lora(net: WanTransformer, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA of every block's linear layers, in two trainers' names, and the changes it makes."""
    generator = torch.Generator().manual_seed(seed)
    adapter, changes = {}, {}
    for name, layer in net.named_modules():
        if not name.startswith("blocks.") or not is_linear(layer) or name.endswith("proj_l"):
            continue
        rows, columns = full_weight(layer).shape
        down = torch.randn(8, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, 8, generator=generator) * 0.05
        if name.startswith("blocks.0."):
            adapter |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
            changes[name] = up @ down
        else:
            flat = f"lora_unet_{name.replace('.', '_')}"
            adapter |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(4.0)}
            changes[name] = up @ down * 4 / 8
    return adapter, changes


def fresh_seed() -> int:
    return int(torch.randint(1 << 31, (), generator=SEEDS))


SEEDS = torch.Generator()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="ComfyUI's folder")
    parser.add_argument("--python", type=Path, help="an interpreter with ComfyUI's packages")
    parser.add_argument("-k", default="", help="only cases with this in their name")
    parser.add_argument("--seed", type=int, help="repeat the seeds of an earlier run")
    args = parser.parse_args()
    if args.folder is None:
        print("SKIPPED: no ComfyUI given; name its folder to run our nodes in it")
        return 0
    beside = args.folder.resolve().parent / "venv" / "bin" / "python"
    python = args.python or (beside if beside.exists() else Path(sys.executable))
    seed = args.seed if args.seed is not None else SEEDS.seed()
    SEEDS.manual_seed(seed)
    print(f"seed {seed}")
    failed = 0
    with Server(args.folder.resolve(), python) as server:
        for name in ("t2v-tiny.pth", "t2v-tiny-quant.pth"):
            (server.models("diffusion_models") / name).symlink_to(REPOSITORY_GOLDEN(name))
        (server.base / "input" / "t2v-tiny.io.safetensors").symlink_to(GOLDEN / "t2v-tiny.io.safetensors")
        for run in CASES:
            if args.k not in run.__name__:
                continue
            started = time.monotonic()
            try:
                result = run(server)
                print(f"ok    {run.__name__} ({time.monotonic() - started:.1f} s): {result}", flush=True)
            except (AssertionError, Refused, Failed, Interrupted, TimeoutError, OSError) as error:
                failed += 1
                print(f"FAIL  {run.__name__} ({time.monotonic() - started:.1f} s): {error}", flush=True)
                traceback.print_exc()
                print(server.log.read_text()[-3000:])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
