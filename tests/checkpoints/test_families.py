"""Every family's files give the module that the official layout's give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from turbowan.checkpoints import load_image_encoder, load_text_encoder, load_transformer, load_vae
from turbowan.checkpoints.names import WAN_IMAGE_ENCODER, WAN_TEXT_ENCODER, rename
from turbowan.checkpoints.quantize import quantize_transformer
from turbowan.checkpoints.tokenizer import find_tokenizer
from turbowan.models.image_encoder import MEAN, STD
from turbowan.models.linear import Int8BlockLinear, Int8RowLinear, ScaledLinear
from turbowan.models.tokenizer import Tokenizer

PATCH = "patch_embedding.weight"
State = dict[str, Tensor]
Velocity = Callable[..., Tensor]


def as_wan(state: State) -> State:
    return {**state, PATCH: state[PATCH].unflatten(1, (-1, 1, 2, 2))}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def large_layers(state: State) -> list[str]:
    """The linear layers inside the blocks but SLA's projection."""
    weights = [key for key, value in state.items() if key.startswith("blocks.") and key.endswith(".weight")]
    return [key.removesuffix(".weight") for key in weights if state[key].ndim == 2 and "proj_l" not in key]


def in_fp8(state: State, layers: list[str], dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[State, State]:
    """fp8 values and scales, under `layer.weight` and `layer`, and the state with the values these stand for."""
    eight, rounded = {}, dict(state)
    for layer in layers:
        weight = state[f"{layer}.weight"].float()
        scale = weight.abs().amax() / torch.finfo(dtype).max
        eight[f"{layer}.weight"], eight[layer] = (weight / scale).to(dtype), scale
        rounded[f"{layer}.weight"] = eight[f"{layer}.weight"].float() * scale
    return eight, rounded


@pytest.mark.parametrize("kind", ["t2v", "t2v-sla", "i2v-sla", "i2v-2.1"])
def test_plain_transformers_are_the_same_in_every_wrapping(
    kind: str, tmp_path: Path, transformer_state: Callable[..., State], velocity: Velocity
) -> None:
    state = transformer_state(kind)
    torch.save(state, tmp_path / "official.pth")
    wrapped = {key.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): v for key, v in state.items()}
    torch.save(wrapped, tmp_path / "wrapped.pth")
    torch.save({"state_dict": prefixed("net.", wrapped), "step": 3}, tmp_path / "training.pth")
    torch.save(prefixed("net.", as_wan(state)), tmp_path / "net.pt")
    torch.save(as_wan(state), tmp_path / "wan.pth")
    torch.save(state, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "official.safetensors")
    save_file(as_wan(state), tmp_path / "comfy-bare.safetensors")
    save_file(prefixed("model.diffusion_model.", as_wan(state)), tmp_path / "comfy.safetensors")
    options = {"sla_topk": 0.5} if "sla" in kind else {}
    expected = velocity(tmp_path / "official.pth", **options)
    assert load_transformer(tmp_path / "official.pth").config.has_sla == ("sla" in kind)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 9
    for path in files:
        assert torch.equal(velocity(path, **options), expected), path.name


def test_sharded_wan(tmp_path: Path, transformer_state: Callable[..., State], velocity: Velocity) -> None:
    state = transformer_state("t2v")
    torch.save(state, tmp_path / "official.pth")
    folder = tmp_path / "high_noise_model"
    folder.mkdir()
    wan = list(as_wan(state).items())
    index = {}
    for i, part in enumerate((wan[::2], wan[1::2]), start=1):
        name = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file(dict(part), folder / name)
        index |= {key: name for key, _ in part}
    index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    expected = velocity(tmp_path / "official.pth")
    assert torch.equal(velocity(folder), expected)
    assert torch.equal(velocity(index_file), expected)


@pytest.mark.parametrize("kind", ["t2v-sla", "i2v-2.1"])
def test_official_int8_blocks_run_in_int8(
    kind: str,
    tmp_path: Path,
    transformer_state: Callable[..., State],
    velocity: Velocity,
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    state = transformer_state(kind)
    quantized = quantize_transformer(state)
    torch.save(state, tmp_path / "plain.pth")
    torch.save(quantized, tmp_path / "quant.pth")
    torch.save({"state_dict": prefixed("net.", quantized)}, tmp_path / "net-quant.pth")
    save_file(quantized, tmp_path / "quant.safetensors")
    blocks = [m for m in load_transformer(tmp_path / "quant.pth").modules() if isinstance(m, Int8BlockLinear)]
    assert len(blocks) == 2 * (12 if kind == "i2v-2.1" else 10)
    ours = velocity(tmp_path / "quant.pth", attention="original")
    assert 0.001 < relative_error(ours, velocity(tmp_path / "plain.pth", attention="original")) < 0.03
    for name in ("net-quant.pth", "quant.safetensors"):
        assert torch.equal(velocity(tmp_path / name, attention="original"), ours), name


def test_lightx2v_int8_rows_run_in_int8(
    tmp_path: Path,
    transformer_state: Callable[..., State],
    velocity: Velocity,
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    state = as_wan(transformer_state("i2v"))
    rounded, rows, comfy = dict(state), dict(state), prefixed("model.diffusion_model.", state)
    for layer in large_layers(state):
        weight = state[f"{layer}.weight"].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        codes = (weight / scale).round().to(torch.int8)
        rounded[f"{layer}.weight"] = codes * scale
        rows |= {f"{layer}.weight": codes, f"{layer}.weight_scale": scale}
        facts = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
        comfy |= prefixed(
            f"model.diffusion_model.{layer}.",
            {"weight": codes, "weight_scale": scale.flatten(), "comfy_quant": facts},
        )
    save_file(rows, tmp_path / "rows.safetensors")
    save_file(comfy, tmp_path / "comfy.safetensors")
    save_file(rounded, tmp_path / "rounded.safetensors")
    net = load_transformer(tmp_path / "rows.safetensors")
    assert sum(isinstance(module, Int8RowLinear) for module in net.modules()) == 20
    ours = velocity(tmp_path / "rows.safetensors")
    # activations are rounded, too
    assert 1e-4 < relative_error(ours, velocity(tmp_path / "rounded.safetensors")) < 0.02
    assert torch.equal(velocity(tmp_path / "comfy.safetensors"), ours)


@pytest.mark.parametrize("notation", ["marker", "comfy_quant", "metadata", "lightx2v"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scaled_fp8_transformers(
    notation: str,
    dtype: torch.dtype,
    tmp_path: Path,
    transformer_state: Callable[..., State],
    velocity: Velocity,
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    state = as_wan(transformer_state("t2v"))
    outside = ["text_embedding.0", "time_embedding.2", "time_projection.1", "head.head"]  # some files round these, too
    layers = large_layers(state) + (outside if notation in ("marker", "metadata") else [])
    eight, rounded = in_fp8(state, layers, dtype)
    file = dict(state)
    name = str(dtype).removeprefix("torch.")
    metadata = None
    for layer in layers:
        file[f"{layer}.weight"] = eight[f"{layer}.weight"]
        if notation == "marker":
            file |= {f"{layer}.scale_weight": eight[layer], f"{layer}.scale_input": torch.tensor(0.7)}
        else:
            file[f"{layer}.weight_scale"] = eight[layer]
        if notation == "comfy_quant":
            file[f"{layer}.comfy_quant"] = torch.tensor(list(f'{{"format": "{name}"}}'.encode()), dtype=torch.uint8)
        if notation == "lightx2v":  # one scale a row
            file[f"{layer}.weight_scale"] = eight[layer].expand(len(file[f"{layer}.weight"]), 1).contiguous()
    if notation == "marker":
        file["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    if notation == "metadata":
        metadata = {"_quantization_metadata": json.dumps({"layers": {layer: {"format": name} for layer in layers}})}
    prefix = "" if notation == "lightx2v" else "model.diffusion_model."
    save_file(prefixed(prefix, file), tmp_path / "fp8.safetensors", metadata)
    save_file(rounded, tmp_path / "rounded.safetensors")
    save_file(state, tmp_path / "plain.safetensors")
    net = load_transformer(tmp_path / "fp8.safetensors")
    assert sum(isinstance(module, ScaledLinear) for module in net.modules()) == 20
    ours = velocity(tmp_path / "fp8.safetensors")
    assert relative_error(ours, velocity(tmp_path / "rounded.safetensors")) < 1e-5
    assert relative_error(ours, velocity(tmp_path / "plain.safetensors")) < 0.1


def test_fp8_without_scales(
    tmp_path: Path,
    transformer_state: Callable[..., State],
    velocity: Velocity,
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    """The plainest of ComfyUI's files: every tensor cast, norms and embeddings included."""
    eight = {key: value.to(torch.float8_e4m3fn) for key, value in as_wan(transformer_state("t2v")).items()}
    save_file(eight, tmp_path / "fp8.safetensors")
    save_file({key: value.float() for key, value in eight.items()}, tmp_path / "expanded.safetensors")
    net = load_transformer(tmp_path / "fp8.safetensors", dtype=torch.bfloat16)
    assert net.dtype == torch.bfloat16
    assert sum(isinstance(module, ScaledLinear) for module in net.modules()) == 20
    expected = velocity(tmp_path / "expanded.safetensors")
    assert relative_error(velocity(tmp_path / "fp8.safetensors"), expected) < 1e-5


def test_rotated_and_four_bit_layers_are_refused(tmp_path: Path, transformer_state: Callable[..., State]) -> None:
    from turbowan.errors import CheckpointError

    state = prefixed("model.diffusion_model.", as_wan(transformer_state("t2v")))
    for facts in ('{"format": "int8_tensorwise", "convrot": true}', '{"format": "nvfp4"}', "not JSON"):
        layer = "model.diffusion_model.blocks.0.ffn.0.comfy_quant"
        state[layer] = torch.tensor(list(facts.encode()), dtype=torch.uint8)
        save_file(state, tmp_path / "q.safetensors")
        message = r"q\.safetensors: blocks\.0\.ffn\.0.*(convrot|nvfp4|not JSON)"
        with pytest.raises(CheckpointError, match=message) as error:
            load_transformer(tmp_path / "q.safetensors")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "sizes",
    [
        {"in_channels": 16},
        {"in_channels": 36},
        {"in_channels": 36, "image_dim": 128, "added_kv_proj_dim": 256},
    ],
    ids=["t2v", "i2v", "i2v-2.1"],
)
def test_diffusers_transformers(
    sizes: dict[str, int],
    tmp_path: Path,
    velocity: Velocity,
    fresh_seed: int,
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel(num_attention_heads=2, text_dim=64, ffn_dim=384, num_layers=2, **sizes).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="2MB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    draw = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 16, 3, 16, 16, generator=draw)
    text = torch.randn(1, 512, 64, generator=draw)  # diffusers counts on 512 where there are image tokens
    inputs = {"encoder_hidden_states": text, "timestep": torch.tensor([620.0]), "return_dict": False}
    if sizes["in_channels"] == 36:
        latent = torch.cat([latent, torch.randn(1, 20, 3, 16, 16, generator=draw)], dim=1)
    if "image_dim" in sizes:
        inputs["encoder_hidden_states_image"] = torch.randn(1, 5, 128, generator=draw)
    with torch.inference_mode():
        expected = theirs(latent, **inputs)[0]
    assert relative_error(velocity(tmp_path / "transformer", text_rows=512), expected) < 1e-4


def test_vaes(
    tmp_path: Path,
    vae_state: State,
    decoded: Callable[[Path], Tensor],
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    from diffusers import AutoencoderKLWan

    torch.save(vae_state, tmp_path / "Wan2.1_VAE.pth")
    save_file(vae_state, tmp_path / "wan_2.1_vae.safetensors")
    assert torch.equal(decoded(tmp_path / "wan_2.1_vae.safetensors"), decoded(tmp_path / "Wan2.1_VAE.pth"))

    theirs = AutoencoderKLWan(base_dim=16).eval()
    theirs.save_pretrained(tmp_path / "vae")
    vae = load_vae(tmp_path / "vae")
    latent = torch.randn(1, 16, 2, 4, 4)
    raw = latent / vae._statistics()[1] + vae._statistics()[0]
    with torch.inference_mode():
        assert relative_error(vae.decode(latent).clamp(-1, 1), theirs.decode(raw).sample) < 1e-4


def test_text_encoders(
    tmp_path: Path,
    text_state: State,
    spiece: Path,
    embedded: Callable[[Path], Tensor],
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    torch.save(text_state, tmp_path / "wan.pth")
    expected = embedded(tmp_path / "wan.pth")
    piece = {"spiece_model": torch.tensor(list(spiece.read_bytes()), dtype=torch.uint8)}
    comfy = rename(text_state, WAN_TEXT_ENCODER)
    save_file({**comfy, **piece}, tmp_path / "bf16.safetensors")
    save_file({**{k: v.half() for k, v in comfy.items()}, **piece}, tmp_path / "fp16.safetensors")
    assert torch.equal(embedded(tmp_path / "bf16.safetensors"), expected)
    assert relative_error(embedded(tmp_path / "fp16.safetensors"), expected) < 1e-3

    sizes = {"vocab_size": 512, "d_model": 64, "d_kv": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2}
    theirs = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu"))
    theirs.eval().save_pretrained(tmp_path / "text_encoder")
    with torch.inference_mode():
        hidden = theirs(torch.arange(5, 25).unsqueeze(0)).last_hidden_state
    assert relative_error(embedded(tmp_path / "text_encoder"), hidden) < 1e-5

    prompt = ["a red circle moves right on a blue background"]
    for name in ("bf16.safetensors", "fp16.safetensors"):
        ids, mask = find_tokenizer(tmp_path / name)(prompt)
        wanted_ids, wanted_mask = Tokenizer.from_sentencepiece(spiece.read_bytes())(prompt)
        assert torch.equal(ids, wanted_ids)
        assert torch.equal(mask, wanted_mask)


FILE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("run", [torch.float32, torch.bfloat16])
def test_transformers_in_every_dtype_compute_in_the_one_asked_for(
    run: torch.dtype,
    tmp_path: Path,
    transformer_state: Callable[..., State],
    velocity: Velocity,
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    state = transformer_state("i2v-2.1")
    torch.save(state, tmp_path / "x.pth")
    expected = velocity(tmp_path / "x.pth")
    for file in FILE_DTYPES:
        torch.save({key: value.to(file) for key, value in state.items()}, tmp_path / "x.pth")
        ours = velocity(tmp_path / "x.pth", dtype=run)
        assert relative_error(ours, expected) < (1e-2 if run == torch.float32 else 0.03), file


@pytest.mark.parametrize("run", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["wan", "transformers"])
def test_text_encoders_in_every_dtype_compute_in_the_one_asked_for(
    layout: str,
    run: torch.dtype,
    tmp_path: Path,
    text_state: State,
    embedded: Callable[..., Tensor],
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    state = text_state if layout == "wan" else rename(text_state, WAN_TEXT_ENCODER)
    torch.save(text_state, tmp_path / "x.pth")
    expected = embedded(tmp_path / "x.pth")
    for file in FILE_DTYPES:
        torch.save({key: value.to(file) for key, value in state.items()}, tmp_path / "x.pth")
        assert {p.dtype for p in load_text_encoder(tmp_path / "x.pth", dtype=run).parameters()} == {run}
        ours = embedded(tmp_path / "x.pth", dtype=run)
        assert ours.dtype == run
        assert relative_error(ours, expected) < (1e-3 if run == torch.float32 else 0.03), file


def as_wan_clip(state: State) -> State:
    """transformers' names to Wan's own, whose file has the text tower beside."""
    out = {"log_scale": torch.zeros(()), "textual.token_embedding.weight": torch.zeros(8, 4)}
    for key, value in rename(state, WAN_IMAGE_ENCODER, to_theirs=True).items():
        if "class_embedding" in key:
            out["visual.cls_embedding"] = value.view(1, 1, -1)
        elif "position_embedding" in key:
            out["visual.pos_embedding"] = value.unsqueeze(0)
        elif ".q_proj." in key:
            layer, kind = key.split(".")[3], key.rsplit(".", 1)[1]
            qkv = [state[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            out[f"visual.transformer.{layer}.attn.to_qkv.{kind}"] = torch.cat(qkv)
        elif ".k_proj." not in key and ".v_proj." not in key:
            out[key] = value
    return {**out, "visual.head": torch.zeros(128, 64)}


@pytest.mark.parametrize("run", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["wan", "transformers"])
def test_image_encoders_in_every_dtype_compute_in_the_one_asked_for(
    layout: str,
    run: torch.dtype,
    tmp_path: Path,
    clip_state: Callable[[], State],
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    state = clip_state()
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu",
            image_size=28, patch_size=14,
        )
    )  # fmt: skip
    prefix = "" if any(key.startswith("vision_model.") for key in tower.state_dict()) else "vision_model."
    tower.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()})
    image = torch.rand(1, 3, 28, 28) * 2 - 1
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    with torch.inference_mode():
        expected = tower.eval()(((image + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states[-2]
    file_state = as_wan_clip(state) if layout == "wan" else {**state, "visual_projection.weight": torch.zeros(64, 128)}
    for file in FILE_DTYPES:
        torch.save({key: value.to(file) for key, value in file_state.items()}, tmp_path / "x.pth")
        encoder = load_image_encoder(tmp_path / "x.pth", dtype=run)
        assert encoder.width == 128
        assert {p.dtype for p in encoder.parameters()} == {run}
        with torch.inference_mode():
            ours = encoder(image)
        assert ours.dtype == run
        exact = file == run == torch.float32
        assert relative_error(ours, expected) < (1e-5 if exact else 0.03), file


@pytest.mark.parametrize("prefix", ["module.", "net."])
def test_prefixes_are_taken_off_every_role(
    prefix: str,
    tmp_path: Path,
    vae_state: State,
    text_state: State,
    clip_state: Callable[[], State],
    decoded: Callable[[Path], Tensor],
    embedded: Callable[[Path], Tensor],
) -> None:
    roles = {"vae": vae_state, "text": text_state, "clip": clip_state()}
    for role, state in roles.items():
        torch.save(state, tmp_path / f"{role}.pth")
        torch.save(prefixed(prefix, state), tmp_path / f"{role}-wrapped.pth")
    assert torch.equal(decoded(tmp_path / "vae-wrapped.pth"), decoded(tmp_path / "vae.pth"))
    assert torch.equal(embedded(tmp_path / "text-wrapped.pth"), embedded(tmp_path / "text.pth"))
    image = torch.rand(1, 3, 28, 28) * 2 - 1
    wrapped, plain = (load_image_encoder(tmp_path / name)(image) for name in ("clip-wrapped.pth", "clip.pth"))
    assert torch.equal(wrapped, plain)


@pytest.mark.parametrize("embedding", [False, True], ids=["layers", "all"])
@pytest.mark.parametrize("notation", ["scale_weight", "weight_scale"])
def test_scaled_fp8_text_encoders(
    notation: str,
    embedding: bool,
    tmp_path: Path,
    text_state: State,
    spiece: Path,
    embedded: Callable[[Path], Tensor],
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    state = rename(text_state, WAN_TEXT_ENCODER)
    layers = [key.removesuffix(".weight") for key, value in state.items() if value.ndim == 2]
    if not embedding:
        layers = [layer for layer in layers if layer != "shared" and "relative_attention_bias" not in layer]
    eight, rounded = in_fp8(state, layers)
    file = {**state, "spiece_model": torch.tensor(list(spiece.read_bytes()), dtype=torch.uint8)}
    for layer in layers:
        file |= {f"{layer}.weight": eight[f"{layer}.weight"], f"{layer}.{notation}": eight[layer]}
        if notation == "weight_scale":
            file[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    if notation == "scale_weight":
        file["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file(file, tmp_path / "fp8.safetensors")
    save_file(rounded, tmp_path / "rounded.safetensors")
    save_file(state, tmp_path / "plain.safetensors")
    encoder = load_text_encoder(tmp_path / "fp8.safetensors")
    assert sum(isinstance(module, ScaledLinear) for module in encoder.modules()) == 14
    ours = embedded(tmp_path / "fp8.safetensors")
    assert relative_error(ours, embedded(tmp_path / "rounded.safetensors")) < 1e-5
    assert relative_error(ours, embedded(tmp_path / "plain.safetensors")) < 0.1
    save_file({k: v.float() if "norm" in k else v for k, v in file.items()}, tmp_path / "fp8.safetensors")
    encoder = load_text_encoder(tmp_path / "fp8.safetensors", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    assert relative_error(embedded(tmp_path / "fp8.safetensors", dtype=torch.bfloat16), ours) < 0.03
