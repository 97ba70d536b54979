"""The flags of both scripts, what they ask for, and the recorded runs of the official code they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from turbowan.checkpoints import load_transformer
from turbowan.compat import official, wan2_1_t2v_infer, wan2_2_i2v_infer
from turbowan.request import GenerateRequest
from turbowan.sampling import rcm
from turbowan.settings import fit_area
from turbowan.specs import RESOLUTIONS

Golden = Callable[[str], Path]
Recorded = Callable[..., list[Tensor]]
RelativeError = Callable[[Tensor, Tensor], float]

REQUIRED = object()
# flag: (type, default, choices), of thu-ml/TurboDiffusion's turbodiffusion/inference/wan2.1_t2v_infer.py ...
T2V = {
    "--dit_path": (str, REQUIRED, None),
    "--model": (str, "Wan2.1-1.3B", ["Wan2.1-1.3B", "Wan2.1-14B"]),
    "--num_samples": (int, 1, None),
    "--num_steps": (int, 4, [1, 2, 3, 4]),
    "--sigma_max": (float, 80, None),
    "--vae_path": (str, "checkpoints/Wan2.1_VAE.pth", None),
    "--text_encoder_path": (str, "checkpoints/models_t5_umt5-xxl-enc-bf16.pth", None),
    "--num_frames": (int, 81, None),
    "--prompt": (str, None, None),
    "--resolution": (str, "480p", None),
    "--aspect_ratio": (str, "16:9", None),
    "--seed": (int, 0, None),
    "--save_path": (str, "output/generated_video.mp4", None),
    "--attention_type": (str, "sagesla", ["sla", "sagesla", "original"]),
    "--sla_topk": (float, 0.1, None),
    "--quant_linear": (bool, False, None),
    "--default_norm": (bool, False, None),
    "--serve": (bool, False, None),
}
# ... and of wan2.2_i2v_infer.py
I2V = {name: value for name, value in T2V.items() if name != "--dit_path"} | {
    "--image_path": (str, None, None),
    "--high_noise_model_path": (str, REQUIRED, None),
    "--low_noise_model_path": (str, REQUIRED, None),
    "--boundary": (float, 0.9, None),
    "--model": (str, "Wan2.2-A14B", ["Wan2.2-A14B"]),
    "--sigma_max": (float, 200, None),
    "--resolution": (str, "720p", None),
    "--adaptive_resolution": (bool, False, None),
    "--ode": (bool, False, None),
}
SCRIPTS = [(wan2_1_t2v_infer, T2V), (wan2_2_i2v_infer, I2V)]


@pytest.mark.parametrize(("script", "table"), SCRIPTS, ids=["t2v", "i2v"])
def test_flags_are_the_official_ones(script, table):
    flags = [action for action in script.parser()._actions if action.dest != "help"]
    ours = {}
    for action in flags:
        switch = isinstance(action, argparse._StoreTrueAction)
        kind = bool if switch else action.type or str
        default = REQUIRED if action.required else action.default
        ours[action.option_strings[0]] = (kind, default, list(action.choices) if action.choices else None)
        assert len(action.option_strings) == 1
    assert ours == table


@pytest.mark.parametrize(("script", "table"), SCRIPTS, ids=["t2v", "i2v"])
def test_flags_take_values_of_their_types(script, table):
    texts = {str: "1:1", int: "3", float: "0.25", bool: None}
    argv, wanted = [], {}
    for name, (kind, _, choices) in table.items():
        text = str(choices[-1]) if choices else texts[kind]
        argv += [name] if text is None else [name, text]
        wanted[name[2:]] = True if text is None else kind(text)
    assert vars(script.parser().parse_args(argv)) == wanted


def test_request_says_everything_the_official_code_fixes():
    args = wan2_1_t2v_infer.parser().parse_args(["--dit_path", "x.pth", "--prompt", "a cat"])
    assert official.request(args, "cuda") == GenerateRequest(
        prompt="a cat", resolution="480p", aspect_ratio="16:9", num_frames=81, fps=16, num_steps=4, sampler="rcm",
        sigma_max=80, guidance_scale=1, seed=0, noise_device="cuda", num_samples=1, attention="sagesla", sla_topk=0.1,
        norms="official", precision="bf16",
    )  # fmt: skip
    assert official.request(args, "cpu").precision == "auto"  # float32


@pytest.mark.parametrize(
    ("attention", "capability", "wanted"),
    [
        ("sagesla", (9, 0), (64, 128)),
        ("sla", (9, 0), (128, 64)),
        ("original", (9, 0), (128, 64)),
        ("sagesla", (8, 0), (128, 64)),
        ("sagesla", (8, 9), (128, 64)),
        ("sagesla", (10, 0), (128, 64)),
        ("sagesla", (12, 0), (128, 64)),
        ("sagesla", None, (128, 64)),
    ],
)
def test_blocks_follow_the_device(attention, capability, wanted):
    assert official.blocks(attention, capability) == wanted


@pytest.mark.parametrize(
    ("file", "attention"), [("t2v-tiny.pth", "sla"), ("t2v-tiny.pth", "sagesla"), ("t2v-tiny-quant.pth", "sagesla")]
)
def test_blocks_give_what_hopper_gave(
    golden: Golden, recorded: Recorded, relative_error: RelativeError, file: str, attention: str
):
    precision = "int8" if "quant" in file else "bf16"
    x, context, wanted = recorded("t2v-tiny.io.safetensors", "x", "context", f"out.{attention}.{precision}")

    def error(capability: tuple[int, int]) -> float:
        block_q, block_k = official.blocks(attention, capability)
        net = load_transformer(golden(file), "cpu", torch.float32, attention, 0.25, block_q, block_k, "official")
        with torch.inference_mode():
            out = net(x.float(), torch.tensor([936.0]), context.float())
        return relative_error(out, wanted)

    assert error((9, 0)) <= (0.012 if "quant" in file else 0.008)
    if attention == "sagesla":
        assert error((8, 9)) > 0.03  # another GPU's blocks give another picture


@pytest.mark.parametrize("flag", [[], ["--default_norm"]], ids=["fast", "default"])
def test_norms_are_those_of_the_flag(golden: Golden, relative_error: RelativeError, flag: list[str]):
    args = wan2_1_t2v_infer.parser().parse_args(["--dit_path", "x.pth", "--prompt", "a cat", *flag])
    norms = official.request(args, "cpu").norms
    recorded = load_file(golden("t2v-384.io.safetensors"))
    net = load_transformer(golden("t2v-384.pth"), attention="sla", sla_topk=0.4, norms=norms)
    timestep = torch.tensor([620.0]).bfloat16().float()
    with torch.inference_mode():
        out = net(recorded["x"].float(), timestep, recorded["context"].float())
    fast, default = recorded["out.sla.fast_norm"], recorded["out.sla.default_norm"]
    wanted, other = (default, fast) if flag else (fast, default)
    assert relative_error(out, wanted) <= 0.011
    assert relative_error(out, other) > 0.05


@pytest.mark.parametrize("ode", [False, True], ids=["sde", "ode"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("sigma_max", [80, 200, 1600])
def test_sampler_is_the_official_arithmetic_bit_for_bit(sigma_max: float, steps: int, ode: bool):
    """The official updates with their dtypes: times are tensors without axes, so noise is weighted in float32."""
    noises = [torch.randn(2, 16, 3, 8, 12) for _ in range(steps + 1)]
    mixing = torch.randn(16, 16)

    def network(latent: Tensor, timestep: Tensor) -> Tensor:
        return torch.einsum("oc,bcthw->bothw", mixing, latent.float()).sin() + timestep.float() / 1000

    angles = torch.tensor([np.arctan(sigma_max), *(1.5, 1.4, 1.0)[: steps - 1], 0], dtype=torch.float64)
    times = angles.sin() / (angles.cos() + angles.sin())
    state = noises[0].double() * times[0]
    for i in range(steps):
        now, following = times[i], times[i + 1]
        rounded_time = (now.float() * torch.ones(2, 1, dtype=torch.float64) * 1000).bfloat16()
        velocity = network(state.bfloat16(), rounded_time[0]).double()
        if ode:
            state = state - (now - following) * velocity
        else:
            state = (1 - following) * (state - now * velocity) + following * noises[i + 1]

    def as_the_engine_does(latent: Tensor, t: float, step: int) -> Tensor:
        timestep = (torch.tensor(t, dtype=torch.float32) * 1000).bfloat16()
        return network(latent.float().bfloat16(), timestep)

    ours = rcm.sample(as_the_engine_does, noises, rcm.timesteps(steps, sigma_max), ode)
    assert torch.equal(ours, state.float())


def test_adaptive_sizes_are_the_official_ones_also_at_halves():
    random = np.random.default_rng()
    areas = sorted({w * h for table in RESOLUTIONS.values() for w, h in table.values()})
    images = [(576, 1875, 307200), (625, 192, 307200)]  # round the other way in another order of operations
    images += [(*random.integers(64, 4000, 2).tolist(), area) for area in areas for _ in range(500)]
    for width, height, area in images:
        ratio = height / width
        wanted = (round(np.sqrt(area / ratio) / 16) * 16, round(np.sqrt(area * ratio) / 16) * 16)
        assert fit_area(area, ratio) == tuple(max(16, size) for size in wanted)
