"""What the engine, by itself, makes of the recorded transformer; and what came out of ComfyUI."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from real_graphs import RECORDED_SHAPE, Graph, changed, node
from real_server import HERE, REPOSITORY, Failed, Refused, Server
from safetensors.torch import load_file
from torch import Tensor

from turbowan.checkpoints import load_transformer
from turbowan.models.linear import EightBitLinear
from turbowan.models.pack import full_weight, is_linear, round_linears
from turbowan.models.transformer import PATCH, AttentionConfig, TransformerConfig, WanTransformer
from turbowan.models.vae import LATENT_MEAN, LATENT_STD, WanVAE
from turbowan.sampling import noise, rcm

GOLDEN = HERE.parent / "golden"
DENSE = AttentionConfig()


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


def probed(graph: Graph, sampler: str, link: str, name: str, model: list | None = None) -> Graph:
    """The graph with every call of a sampler's model kept under a name (see `calls`).

    Args:
        link: the sampler's input. model: what is linked to it; None leaves what is linked already.
    """
    probe = node("ProbeCalls", model=model or graph[sampler]["inputs"][link], name=name)
    return {**changed(graph, sampler, **{link: [f"probe-{name}", 0]}), f"probe-{name}": probe}


def calls(server: Server, name: str) -> list[dict[str, Tensor]]:
    """x, timestep, context and out of each call of a network that ComfyUI made, in order."""
    return [load_file(path) for path in sorted((server.base / "output" / "calls").glob(f"{name}-??.safetensors"))]


@torch.inference_mode()
def velocity_of_ours(net: WanTransformer, call: dict[str, Tensor]) -> Tensor:
    """What the engine's network makes of a call's input, rounded and told as the engine does it."""
    channels = net.config.out_dim
    latent, known = call["x"][:, :channels], call["x"][:, channels:]
    latent, timestep, condition = rcm.round_inputs(latent, call["timestep"], known if known.shape[1] else None)
    text = call["context"]
    rows = int(text.ne(0).any(dim=2).any(dim=0).nonzero().max()) + 2  # the row after the prompt stands for the rest
    return net(latent, timestep, text[:, :rows], condition, text_rows=text.shape[1])


def step_of_ours(net: WanTransformer, call: dict[str, Tensor], times: Tensor, seed: int, i: int, ode: bool) -> Tensor:
    """The engine's own step from times[0] to times[1], from the state that ComfyUI's sampler had come to."""
    draws = noise.draw(call["x"].shape, i + 1, seed)
    return rcm.sample(lambda *_: velocity_of_ours(net, call), [draws[0], draws[i]], times, ode, start=call["x"])


def ours(net: WanTransformer, seed: int, sampler: str, steps: int = 4) -> Tensor:
    """The engine's own steps with the noise that ComfyUI's nodes draw: `lcm` starts its generator anew."""
    text = load_file(GOLDEN / "t2v-tiny.io.safetensors")["context"].float().reshape(1, 512, -1)
    draws = noise.draw(RECORDED_SHAPE, steps, seed)

    def velocity(latent: Tensor, t: float, step: int) -> Tensor:
        x, timestep, _ = rcm.round_inputs(latent, torch.tensor(t, dtype=torch.float32) * 1000)
        return net(x, timestep.expand(1), text)

    with torch.inference_mode():
        return rcm.sample(velocity, [draws[0], *draws], rcm.timesteps(steps, 80.0), ode=sampler == "euler")


def refusal(server: Server, graph: Graph) -> str:
    """What the server says to a graph; nothing where it ran."""
    try:
        server.run(graph)
    except (Failed, Refused) as error:
        return str(error)
    return ""


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


class Change(NamedTuple):
    """What a LoRA of strength 1 adds to a layer's weight: up [N, R] times down [R, K]."""

    down: Tensor
    up: Tensor


def beside(path: Path, changes: dict[str, Change], attention: AttentionConfig) -> WanTransformer:
    """A transformer whose layers stay in 8 bits, the changes beside them in floats."""
    net = load_transformer(path)
    net.attention = attention
    for name, change in changes.items():
        layer = net.get_submodule(name)
        assert isinstance(layer, EightBitLinear), name
        layer.addition = partial(_product, change)
    return net


def _product(change: Change, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, change.down), change.up)


def in_floats(
    path: Path, changes: dict[str, Change], strength: float = 1.0, attention: AttentionConfig = DENSE
) -> WanTransformer:
    """A transformer with linear layers in float32, the changes merged into them."""
    net = load_transformer(path)
    net.attention = attention
    round_linears(net, "bf16")
    for name, (down, up) in changes.items():
        net.get_submodule(name).weight.data += strength * up @ down
    return net


def random_lora(net: WanTransformer, seed: int, rank: int = 8) -> tuple[dict[str, Tensor], dict[str, Change]]:
    """A LoRA of every block's linear layers, in two trainers' names, and the changes it makes."""
    generator = torch.Generator().manual_seed(seed)
    adapter, changes = {}, {}
    for name, layer in net.named_modules():
        if not name.startswith("blocks.") or not is_linear(layer) or name.endswith("proj_l"):
            continue
        rows, columns = full_weight(layer).shape
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, rank, generator=generator) * 0.05
        if name.startswith("blocks.0."):
            adapter |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
            changes[name] = Change(down, up)
        else:
            flat = f"lora_unet_{name.replace('.', '_')}"
            adapter |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
            adapter[f"{flat}.alpha"] = torch.tensor(rank / 2)
            changes[name] = Change(down, up / 2)
    return adapter, changes


def plain_wan(dim: int, layers: int, text_dim: int, **sizes: int) -> dict[str, Tensor]:
    """A small random Wan 2.1 file in Wan's own layout, whose patch embedding is a convolution. sizes: of
    `TransformerConfig`, for others than text-to-video."""
    config = TransformerConfig(dim=dim, ffn_dim=2 * dim, num_layers=layers, text_dim=text_dim, **sizes)
    state = {key: value.detach().clone() for key, value in WanTransformer(config).state_dict().items()}
    state["head.head.weight"] += torch.randn_like(state["head.head.weight"]) * 0.1
    return state | {"patch_embedding.weight": state["patch_embedding.weight"].unflatten(1, (-1, *PATCH)).clone()}


def plain_vae(dim: int) -> dict[str, Tensor]:
    """A random Wan 2.1 VAE."""
    return {key: value.detach().clone() for key, value in WanVAE(dim).state_dict().items()}
