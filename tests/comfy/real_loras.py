"""LoRAs in a real ComfyUI, on weights in floats and in 8 bits."""

from __future__ import annotations

import itertools
from statistics import median

import torch
from real_cases import Cases
from real_graphs import changed, image_to_video, node, recorded, text_to_video
from real_inputs import ASSETS, EMBEDDED, fresh_seed, start_picture
from real_reference import (
    apart,
    beside,
    calls,
    golden_file,
    in_floats,
    kept,
    ours,
    probed,
    random_lora,
    velocity_of_ours,
)
from real_server import Server
from safetensors.torch import save_file

from turbowan.checkpoints import load_text_encoder, load_transformer
from turbowan.checkpoints.tokenizer import find_tokenizer
from turbowan.models.transformer import AttentionConfig

case = Cases()


@case
def lora_changes_as_merged_weights_do(server: Server) -> str:
    seed = fresh_seed()
    lines = []
    for file in ("t2v-tiny.pth", "t2v-tiny-quant.pth"):
        net = load_transformer(golden_file(file), attention="original")
        adapter, changes = random_lora(net, seed)
        save_file(adapter, server.models("loras") / "probe.safetensors")
        merged = in_floats(golden_file(file), changes, 0.7)
        unchanged = in_floats(golden_file(file), {})
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


@case
def a_lora_beside_8_bits_under_sparse_attention(server: Server) -> str:
    """Rank 16 at strength 1.0, every evaluation of four steps.

    Each is the engine's with the change beside its layers in 8 bits. Against the LoRA merged into floats it differs by
    no more than twice what the layers without it differ from floats (medians: rounded queries and keys choose other
    blocks now and then, which is seldom and large).
    """
    lines = []
    for name, kind in itertools.product(("tiny", "t2v-tiny-quant.pth"), ("sla", "sagesla")):
        path, seed = EMBEDDED.get(name) or golden_file(name), fresh_seed()
        adapter, changes = random_lora(load_transformer(path), seed, rank=16)
        label = f"rank16-{path.stem}-{kind}"
        save_file(adapter, server.models("loras") / f"{label}.safetensors")  # ComfyUI keeps what it read of a name
        graph = changed(text_to_video(seed), "model", attention_type=kind)
        if name != "tiny":
            graph = changed(recorded(seed, name, kind, "euler"), "model", sla_topk=0.5)
        graph = {key: each for key, each in graph.items() if key not in ("vae", "frames", "save")}
        graph["keep"] = node("SaveLatent", samples=["sample", 0], filename_prefix="latents/kept")
        graph["lora"] = node(
            "LoraLoaderModelOnly", model=["model", 0], lora_name=f"{label}.safetensors", strength_model=1.0
        )
        kept(server, probed(graph, "sample", "model", label, ["lora", 0]))
        how = AttentionConfig(kind, graph["model"]["inputs"]["sla_topk"])
        nets = {
            "merged": in_floats(path, changes, attention=how), "floats": in_floats(path, {}, attention=how),
            "beside": beside(path, changes, how), "8 bits": beside(path, {}, how),
        }  # fmt: skip
        found: dict[str, list[float]] = {key: [] for key in ("same", "error", "precision", "effect")}
        for call in calls(server, label):
            made = {key: velocity_of_ours(net, call) for key, net in nets.items()}
            found["same"].append(apart(call["out"], made["beside"]))
            found["error"].append(apart(call["out"], made["merged"]))
            found["precision"].append(apart(made["8 bits"], made["floats"]))
            found["effect"].append(apart(made["merged"], made["floats"]))
        error, precision, effect = (median(found[key]) for key in ("error", "precision", "effect"))
        lines.append(
            f"{name} {kind}: changed by {effect:.1%}, {max(found['same']):.0e} from the engine's,"
            f" {error:.1e} from floats (8 bits alone {precision:.1e})"
        )
        print(f"    {lines[-1]}")
        assert len(found["same"]) == 4, found
        assert max(found["same"]) < 1e-5, f"{lines[-1]} (seed {seed})"
        assert error < 2 * precision, f"{lines[-1]} (seed {seed})"
        assert effect > 2 * error, f"{lines[-1]} (seed {seed})"
    return "; ".join(lines)


@case
def a_lora_on_both_8_bit_experts_and_the_text_encoder(server: Server) -> str:
    """One file for all three, by LoraLoader: each evaluation against weights merged in floats, and the text against a
    merged encoder."""
    start_picture(server)
    seed, strengths = fresh_seed(), {"high": 3.0, "low": 2.5}
    transformer, changes = random_lora(load_transformer(EMBEDDED["tiny-i2v-high"]), seed)
    encoder = load_text_encoder(ASSETS / "tiny" / "text_encoder.safetensors")
    adapter, merged = dict(transformer), dict(encoder.model.named_parameters())
    for name, weight in merged.items():
        if name.endswith(("SelfAttention.q.weight", "wo.weight")):
            down, up = torch.randn(4, weight.shape[1]) / weight.shape[1] ** 0.5, torch.randn(weight.shape[0], 4) * 0.3
            key = f"text_encoders.umt5xxl.transformer.{name.removesuffix('.weight')}"
            adapter |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            weight.data += 0.7 * up @ down
    save_file(adapter, server.models("loras") / "all.safetensors")
    graph = image_to_video(seed, num_steps=2, boundary=0.95)
    for key, strength in strengths.items():
        graph = changed(graph, key, attention_type="original")  # sparse attention doubles what 8 bits change
        graph[f"lora-{key}"] = node(
            "LoraLoader", model=[key, 0], clip=["clip", 0], lora_name="all.safetensors", strength_model=strength,
            strength_clip=0.7,
        )  # fmt: skip
        graph = probed(graph, "sample", f"{key}_noise_model", f"lora-{key}", [f"lora-{key}", 0])
    server.run(changed(graph, "text", clip=["lora-high", 1]))
    lines = []
    for key, strength in strengths.items():
        (call,) = calls(server, f"lora-{key}")
        wanted, plain = (
            velocity_of_ours(in_floats(EMBEDDED[f"tiny-i2v-{key}"], changes, s), call)
            for s in (strength, 0.0)
        )
        eight_bits = load_transformer(EMBEDDED[f"tiny-i2v-{key}"], attention="original")
        precision = apart(velocity_of_ours(eight_bits, call), plain)
        effect, error = apart(wanted, plain), apart(call["out"], wanted)
        lines.append(f"{key} changed by {effect:.1%}, off by {error:.1e} (8 bits alone: {precision:.1e})")
        assert effect > 3 * error, f"{lines[-1]} (seed {seed})"
        assert error < 2 * precision + 1e-5, f"{lines[-1]} (seed {seed})"
    ids, mask = find_tokenizer(ASSETS / "tiny" / "text_encoder.safetensors", ASSETS / "tiny" / "tokenizer")(
        [graph["text"]["inputs"]["text"]]
    )
    with torch.inference_mode():
        text = encoder(ids, mask)
        unchanged = load_text_encoder(ASSETS / "tiny" / "text_encoder.safetensors")(ids, mask)
    error, effect = apart(call["context"], text), apart(unchanged, text)
    assert error < 1e-4 < effect / 10, f"text: changed by {effect:.1%}, off by {error:.1e}"
    return "; ".join([*lines, f"text changed by {effect:.1%}, off by {error:.1e}"])
