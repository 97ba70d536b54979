"""Batches, several pictures, conditions that are not for our models, and where weights live."""

from __future__ import annotations

import torch
from real_cases import Cases
from real_graphs import changed, image_to_video, node, recorded
from real_inputs import EMBEDDED, fresh_seed, start_picture
from real_reference import GOLDEN, apart, calls, golden_file, kept, probed, refusal, velocity_of_ours
from real_seen import shown
from real_server import Server
from safetensors.torch import load_file, save_file

from turbowan.checkpoints import load_transformer
from turbowan.sampling import noise, rcm

case = Cases()


@case
def a_batch_is_sampled_together(server: Server) -> str:
    """Two videos of one prompt: the noise that the engine draws for two, each evaluation the engine's."""
    seed = fresh_seed()
    graph = recorded(seed, "t2v-tiny.pth", "sla", "euler", 1)
    graph["empty"]["inputs"]["batch_size"] = 2
    graph["sample"] = node(
        "TurboWanVideoSampler", model=["model", 0], positive=["text", 0], latent=["empty", 0], num_steps=2, seed=seed,
    )  # fmt: skip
    got = kept(server, probed(graph, "sample", "model", "batch"))
    made, (first, second) = calls(server, "batch"), noise.draw(got.shape, 2, seed)
    assert len(got) == 2
    net, times = load_transformer(golden_file("t2v-tiny.pth"), attention="sla", sla_topk=0.25), rcm.timesteps(2, 80.0)
    velocities = iter([velocity_of_ours(net, call) for call in made])
    wanted = rcm.sample(lambda *_: next(velocities), [first, second], times)
    error, between = apart(got, wanted), apart(got[:1], got[1:])
    assert error < 1e-4, f"{error:.1e} apart (seed {seed})"
    assert between > 0.1, "both samples are alike"
    return f"{error:.1e} from the engine's"


@case
def several_pictures_are_the_first_frames(server: Server) -> str:
    """Five start pictures and a batch of two, from preparation to latent: two frames of the latent are known."""
    start_picture(server)
    graph = image_to_video(0)
    graph["five"] = node("RepeatImageBatch", image=["image", 0], amount=5)
    graph["told"] = node(
        "TurboWanSampler", positive=["text", 0], negative=["text", 0], vae=["vae", 0], start_image=["five", 0],
        width=128, height=96, length=9, batch_size=2,
    )  # fmt: skip
    graph["sample"] = node(
        "TurboWanDualExpertSampler", high_noise_model=["high", 0], low_noise_model=["low", 0], latent=["told", 2],
        conditioning=["told", 0], num_steps=1, boundary=0.9, seed=fresh_seed(), use_ode=True, sigma_max=200.0,
    )  # fmt: skip
    graph["save"] = node("SaveLatent", samples=["sample", 0], filename_prefix="several")
    outputs = server.run(probed(graph, "sample", "high_noise_model", "several"))
    samples = load_file(server.file(outputs["save"]["latents"][0]))["latent_tensor"]
    (call,) = calls(server, "several")
    mask = call["x"][:, 16:20].mean(dim=(1, 3, 4))
    assert samples.shape == (2, 16, 3, 12, 16), samples.shape
    assert mask.tolist() == [[1, 1, 0], [1, 1, 0]], mask
    net = load_transformer(EMBEDDED["tiny-i2v-high"], sla_topk=0.7)
    error = apart(call["out"], velocity_of_ours(net, call))
    assert error < 1e-5, f"{error:.1e}"
    one = image_to_video(fresh_seed(), num_steps=1)
    one["five"] = graph["five"]
    shown(server.run(changed(one, "sample", image=["five", 0])), server)
    assert "image holds 5 pictures" in server.log.read_text(), "nothing is said of four pictures that are not used"
    return f"mask {mask[0].int().tolist()}, {error:.0e} from the engine's"


@case
def conditions_of_an_older_pack_reach_the_network(server: Server) -> str:
    """A dictionary in the text's place, with mask and normalised latent as the network gets them."""
    known = torch.cat([torch.zeros(1, 4, 3, 12, 16), torch.randn(1, 16, 3, 12, 16)], dim=1)
    known[:, :4, 0] = 1
    net = load_transformer(EMBEDDED["tiny-i2v-high"], sla_topk=0.7)
    text = torch.randn(1, 512, net.config.text_dim)
    save_file({"text": text, "known": known}, server.base / "input" / "older.safetensors")
    graph = {key: image_to_video(0)[key] for key in ("high", "low")}
    graph["told"] = node("ProbeConditioning", file="older.safetensors", key="text")
    graph["empty"] = node("EmptyHunyuanLatentVideo", width=128, height=96, length=9, batch_size=1)
    graph["sample"] = node(
        "TurboWanDualExpertSampler", high_noise_model=["high", 0], low_noise_model=["low", 0], latent=["empty", 0],
        conditioning=["told", 0], num_steps=1, boundary=0.9, seed=fresh_seed(), use_ode=True, sigma_max=200.0,
    )  # fmt: skip
    graph["keep"] = node("SaveLatent", samples=["sample", 0], filename_prefix="older")
    kept(server, probed(graph, "sample", "high_noise_model", "older"))
    (call,) = calls(server, "older")
    error = apart(call["x"][:, 16:], known)
    assert error < 1e-6, f"{error:.1e} from what was given"
    assert torch.equal(call["context"], text)
    return f"{error:.0e} from what was given"


@case
def conditions_for_other_models_are_refused_by_name(server: Server) -> str:
    text = load_file(GOLDEN / "t2v-tiny.io.safetensors")["context"].float()
    save_file({"context": text, "reference": torch.randn(1, 16, 1, 16, 24)}, server.base / "input" / "ref.safetensors")
    graph = changed(recorded(fresh_seed(), "t2v-tiny.pth", "sla", "euler", 1), "text", file="ref.safetensors")
    said = refusal(server, graph)
    assert "reference_latent" in said, said or "a reference latent is passed over without a word"
    return said


@case
def where_weights_live_changes_nothing(server: Server) -> str:
    """In every offload mode. ComfyUI takes no --novram beside --cpu: see `partial_load.py` for that."""
    lines = []
    for file, attention in (("t2v-tiny.pth", "sla"), ("t2v-tiny-quant.pth", "sagesla")):
        graph = recorded(fresh_seed(), file, attention, "euler", 2)
        base = kept(server, graph)
        for mode in ("layerwise_gpu", "cpu_only"):
            error = apart(kept(server, changed(graph, "model", offload_mode=mode)), base)
            lines.append(f"{attention} {mode} {error:.0e}")
            assert error < 1e-6, lines[-1]
    return ", ".join(lines)
