"""What the engine, by itself, makes of the recorded transformer; and what came out of ComfyUI."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch
from real_graphs import RECORDED_SHAPE, Graph
from real_server import HERE, REPOSITORY, Server
from safetensors.torch import load_file
from torch import Tensor

from turbowan.checkpoints import load_transformer
from turbowan.models.pack import full_weight, is_linear
from turbowan.models.transformer import PATCH, TransformerConfig, WanTransformer
from turbowan.models.vae import LATENT_MEAN, LATENT_STD, WanVAE
from turbowan.sampling import noise, rcm

GOLDEN = HERE.parent / "golden"


def golden_file(name: str) -> Path:
    """A recorded file: from the folder beside the checkout, else from `tests/golden`."""
    for folder in (REPOSITORY.parent / "shared" / "golden", GOLDEN):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(name)


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
    draws = noise.draw(RECORDED_SHAPE, steps, seed)

    def velocity(latent: Tensor, t: float, step: int) -> Tensor:
        x, timestep, _ = rcm.round_inputs(latent, torch.tensor(t, dtype=torch.float32) * 1000)
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


def in_floats(file: str, changes: dict[str, Tensor]) -> WanTransformer:
    """The recorded transformer with linear layers in float32, the changes added."""
    net = load_transformer(golden_file(file), attention="original")
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
            adapter |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
            adapter[f"{flat}.alpha"] = torch.tensor(4.0)
            changes[name] = up @ down * 4 / 8
    return adapter, changes


def plain_wan(dim: int, layers: int, text_dim: int) -> dict[str, Tensor]:
    """A small random Wan 2.1 text-to-video file in Wan's own layout, whose patch embedding is a convolution."""
    config = TransformerConfig(dim=dim, ffn_dim=2 * dim, num_layers=layers, text_dim=text_dim)
    state = {key: value.detach().clone() for key, value in WanTransformer(config).state_dict().items()}
    state["head.head.weight"] += torch.randn_like(state["head.head.weight"]) * 0.1
    return state | {"patch_embedding.weight": state["patch_embedding.weight"].unflatten(1, (-1, *PATCH)).clone()}


def plain_vae(dim: int) -> dict[str, Tensor]:
    """A random Wan 2.1 VAE."""
    return {key: value.detach().clone() for key, value in WanVAE(dim).state_dict().items()}
