"""Converting keeps every bit, and what it writes is read by those it is for."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbowan.checkpoints.convert import LAYOUTS, convert_checkpoint
from turbowan.checkpoints.detect import detect
from turbowan.checkpoints.files import read_tensors, write_tensors
from turbowan.checkpoints.quantize import quantize_transformer
from turbowan.checkpoints.tokenizer import find_tokenizer
from turbowan.errors import CheckpointError

State = dict[str, Tensor]
PATCH = "patch_embedding.weight"


def assert_same(ours: State, theirs: State) -> None:
    """Keys, shapes, dtypes and bits."""
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype), key
        as_bytes = [x.contiguous().flatten().view(torch.uint8) for x in (ours[key], value)]
        assert torch.equal(*as_bytes), key


def round_trip(source: Path, to: str, back: str, folder: Path, spiece: Path | None = None) -> tuple[State, State]:
    """What the source holds, and what comes back from another layout; the suffixes change on the way."""
    there = folder / "there" if to == "diffusers" else folder / f"there{'.pth' if to == 'wan' else '.safetensors'}"
    written = convert_checkpoint(source, there, to, spiece)
    assert all(path.exists() for path in written)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tokenizer that is left out
        convert_checkpoint(written[0] if to != "diffusers" else there, folder / "back.pth", back)
    return read_tensors(source), read_tensors(folder / "back.pth")


@pytest.mark.parametrize("to", [name for name in LAYOUTS if name != "official"])
@pytest.mark.parametrize("kind", ["t2v", "t2v-sla", "i2v", "i2v-sla", "i2v-2.1"])
def test_official_transformers_come_back_exact(
    kind: str, to: str, tmp_path: Path, transformer_state: Callable[..., State]
) -> None:
    torch.save(transformer_state(kind), tmp_path / "official.pth")
    before, after = round_trip(tmp_path / "official.pth", to, "official", tmp_path)
    assert_same(after, before)


def test_official_int8_blocks_come_back_exact(tmp_path: Path, transformer_state: Callable[..., State]) -> None:
    torch.save(quantize_transformer(transformer_state("i2v-sla")), tmp_path / "quant.pth")
    before, after = round_trip(tmp_path / "quant.pth", "turbowan", "official", tmp_path)
    assert_same(after, before)


@pytest.mark.parametrize("to", [name for name in LAYOUTS if name != "wan"])
def test_original_wan_comes_back_exact(to: str, tmp_path: Path, transformer_state: Callable[..., State]) -> None:
    state = transformer_state("t2v")
    state[PATCH] = state[PATCH].unflatten(1, (-1, 1, 2, 2))
    save_file(state, tmp_path / "wan.safetensors")
    before, after = round_trip(tmp_path / "wan.safetensors", to, "wan", tmp_path)
    assert_same(after, before)


@pytest.mark.parametrize("to", LAYOUTS)
def test_vaes_come_back_exact(to: str, tmp_path: Path, vae_state: State) -> None:
    torch.save(vae_state, tmp_path / "vae.pth")
    before, after = round_trip(tmp_path / "vae.pth", to, "official", tmp_path)
    assert_same(after, before)


@pytest.mark.parametrize("to", LAYOUTS)
def test_text_encoders_come_back_exact(to: str, tmp_path: Path, text_state: State, spiece: Path) -> None:
    torch.save(text_state, tmp_path / "umt5.pth")
    tokenizer = spiece if to in ("comfy", "turbowan") else None
    before, after = round_trip(tmp_path / "umt5.pth", to, "official", tmp_path, tokenizer)
    assert_same(after, before)


def test_wrappers_are_taken_off(tmp_path: Path, transformer_state: Callable[..., State]) -> None:
    state = transformer_state("t2v-sla")
    wrapped = {"net." + k.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): v for k, v in state.items()}
    torch.save({"state_dict": wrapped}, tmp_path / "training.pth")
    convert_checkpoint(tmp_path / "training.pth", tmp_path / "official.safetensors", "official")
    assert_same(load_file(tmp_path / "official.safetensors"), state)


@pytest.mark.parametrize("notation", ["scale_weight", "weight_scale"])
def test_scaled_fp8_keeps_its_bits_and_scales(
    notation: str,
    tmp_path: Path,
    transformer_state: Callable[..., State],
    velocity: Callable[..., Tensor],
) -> None:
    state = transformer_state("t2v")
    state[PATCH] = state[PATCH].unflatten(1, (-1, 1, 2, 2))
    file = {"model.diffusion_model." + key: value for key, value in state.items()}
    for key in [key for key in file if key.endswith(("attn.q.weight", "ffn.2.weight"))]:
        scale = file[key].float().abs().amax() / 448
        file[key] = (file[key] / scale).to(torch.float8_e4m3fn)
        file[key.replace("weight", notation)] = scale
        if notation == "weight_scale":
            facts = list(b'{"format": "float8_e4m3fn"}')
            file[key.replace("weight", "comfy_quant")] = torch.tensor(facts, dtype=torch.uint8)
    if notation == "scale_weight":
        file["model.diffusion_model.scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file(file, tmp_path / "fp8.safetensors")
    convert_checkpoint(tmp_path / "fp8.safetensors", tmp_path / "ours.pth", "turbowan")
    convert_checkpoint(tmp_path / "ours.pth", tmp_path / "comfy.safetensors", "comfy")
    assert torch.equal(velocity(tmp_path / "ours.pth"), velocity(tmp_path / "fp8.safetensors"))
    assert torch.equal(velocity(tmp_path / "comfy.safetensors"), velocity(tmp_path / "fp8.safetensors"))
    if notation == "weight_scale":  # the notation that is written
        assert_same(load_file(tmp_path / "comfy.safetensors"), file)


def test_lightx2v_rows_to_comfy(
    tmp_path: Path, transformer_state: Callable[..., State], velocity: Callable[..., Tensor]
) -> None:
    state = transformer_state("i2v")
    state[PATCH] = state[PATCH].unflatten(1, (-1, 1, 2, 2))
    for key in [key for key in state if key.endswith(("attn.v.weight", "ffn.0.weight"))]:
        scale = state[key].float().abs().amax(dim=1, keepdim=True) / 127
        state |= {key: (state[key] / scale).round().to(torch.int8), f"{key}_scale": scale}
    save_file(state, tmp_path / "rows.safetensors")
    convert_checkpoint(tmp_path / "rows.safetensors", tmp_path / "comfy.safetensors", "comfy")
    comfy = load_file(tmp_path / "comfy.safetensors")
    assert detect(comfy).quantization == "int8_row"
    facts = comfy["model.diffusion_model.blocks.0.ffn.0.comfy_quant"]
    assert json.loads(bytes(facts.tolist())) == {"format": "int8_tensorwise"}
    assert torch.equal(velocity(tmp_path / "comfy.safetensors"), velocity(tmp_path / "rows.safetensors"))


@pytest.mark.parametrize(
    ("quantization", "to", "advice"),
    [
        ("int8_block", "diffusers", "official or turbowan"),
        ("int8_block", "comfy", "official or turbowan"),
        ("int8_block", "wan", "official or turbowan"),
        ("int8_row", "official", "comfy or turbowan"),
        ("int8_row", "diffusers", "comfy or turbowan"),
        ("fp8", "official", "comfy or turbowan"),
        ("fp8", "diffusers", "comfy or turbowan"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(
    quantization: str, to: str, advice: str, tmp_path: Path, transformer_state: Callable[..., State]
) -> None:
    state = transformer_state("t2v")
    key = "blocks.0.ffn.0.weight"
    if quantization == "int8_block":
        state = quantize_transformer(state)
    elif quantization == "int8_row":
        state |= {key: torch.ones(384, 256, dtype=torch.int8), f"{key}_scale": torch.ones(384, 1)}
    else:
        state[key] = state[key].to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "in.pth")
    out = tmp_path / "out" / "x.safetensors"
    message = f"in.pth.*{quantization}.*{to} layout.*full-precision.*{advice}"
    with pytest.raises(CheckpointError, match=message) as error:
        convert_checkpoint(tmp_path / "in.pth", out, to)
    assert "\n" not in str(error.value)
    assert not out.parent.exists()


@pytest.mark.parametrize("kind", ["t2v", "t2v-sla", "i2v", "i2v-2.1"])
def test_diffusers_loads_the_transformer(
    kind: str,
    tmp_path: Path,
    transformer_state: Callable[..., State],
    velocity: Callable[..., Tensor],
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    from diffusers import WanTransformer3DModel

    state = {key: value.float() for key, value in transformer_state(kind).items()}
    torch.save(state, tmp_path / "official.pth")
    written = convert_checkpoint(tmp_path / "official.pth", tmp_path / "transformer", "diffusers")
    assert sorted(path.name for path in written) == ["config.json", "diffusion_pytorch_model.safetensors"]
    net, report = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert all("proj_l" in key for key in report["unexpected_keys"])
    assert bool(report["unexpected_keys"]) == ("sla" in kind)
    draw = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 16, 3, 16, 16, generator=draw)
    inputs = {"encoder_hidden_states": torch.randn(1, 512, 64, generator=draw), "timestep": torch.tensor([620.0])}
    if "i2v" in kind:
        latent = torch.cat([latent, torch.randn(1, 20, 3, 16, 16, generator=draw)], dim=1)
    if kind == "i2v-2.1":
        inputs["encoder_hidden_states_image"] = torch.randn(1, 5, 128, generator=draw)
    with torch.inference_mode():
        theirs = net(latent, **inputs, return_dict=False)[0]
    ours = velocity(tmp_path / "official.pth", text_rows=512, attention="original")
    assert relative_error(ours, theirs) < 1e-4


def test_diffusers_loads_the_vae(tmp_path: Path, vae_state: State) -> None:
    from diffusers import AutoencoderKLWan

    torch.save(vae_state, tmp_path / "vae.pth")
    convert_checkpoint(tmp_path / "vae.pth", tmp_path / "vae", "diffusers")
    vae, report = AutoencoderKLWan.from_pretrained(
        tmp_path / "vae", output_loading_info=True, torch_dtype=torch.bfloat16
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert vae.config.base_dim == 16
    assert torch.equal(vae.state_dict()["encoder.conv_in.weight"], vae_state["encoder.conv1.weight"])


def test_transformers_loads_the_text_encoder(
    tmp_path: Path,
    text_state: State,
    embedded: Callable[[Path], Tensor],
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    from transformers import UMT5EncoderModel

    torch.save(text_state, tmp_path / "umt5.pth")
    written = convert_checkpoint(tmp_path / "umt5.pth", tmp_path / "text_encoder", "diffusers")
    assert sorted(path.name for path in written) == ["config.json", "model.safetensors"]
    encoder, report = UMT5EncoderModel.from_pretrained(
        tmp_path / "text_encoder", output_loading_info=True, torch_dtype=torch.float32
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        hidden = encoder.eval()(torch.arange(5, 25).unsqueeze(0)).last_hidden_state
    assert relative_error(embedded(tmp_path / "umt5.pth"), hidden) < 1e-5


def test_a_single_file_for_diffusers_has_no_config_beside_it(tmp_path: Path, vae_state: State) -> None:
    torch.save(vae_state, tmp_path / "vae.pth")
    out = tmp_path / "out" / "vae.safetensors"
    assert convert_checkpoint(tmp_path / "vae.pth", out, "diffusers") == [out]
    assert os.listdir(out.parent) == ["vae.safetensors"]


def test_the_tokenizer_travels_inside(tmp_path: Path, text_state: State, spiece: Path) -> None:
    torch.save(text_state, tmp_path / "umt5.pth")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(spiece.read_bytes())
    convert_checkpoint(tmp_path / "umt5.pth", tmp_path / "away" / "comfy.safetensors", "comfy")  # beside the input
    piece = load_file(tmp_path / "away" / "comfy.safetensors")["spiece_model"]
    assert bytes(piece.tolist()) == spiece.read_bytes()
    for name in ("ours.safetensors", "ours.pth"):
        convert_checkpoint(tmp_path / "away" / "comfy.safetensors", tmp_path / "away" / name, "turbowan")
        ids, _ = find_tokenizer(tmp_path / "away" / name)(["a red circle"])
        assert ids[0, 0] > 1
    with pytest.warns(UserWarning, match="tokenizer inside .* is left out"):
        convert_checkpoint(tmp_path / "away" / "comfy.safetensors", tmp_path / "away" / "plain.pth", "official")
    assert_same(read_tensors(tmp_path / "away" / "plain.pth"), text_state)


def test_comfy_text_encoders_need_a_tokenizer(
    tmp_path: Path, text_state: State, spiece: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    torch.save(text_state, tmp_path / "umt5.pth")
    with pytest.raises(CheckpointError, match=r"pass --tokenizer with umT5's spiece\.model"):
        convert_checkpoint(tmp_path / "umt5.pth", tmp_path / "out.safetensors", "comfy")
    with pytest.raises(CheckpointError, match="missing does not exist"):
        convert_checkpoint(tmp_path / "umt5.pth", tmp_path / "out.safetensors", "comfy", tmp_path / "missing")
    (tmp_path / "bad.model").write_bytes(b"no tokenizer")
    with pytest.raises(CheckpointError, match=r"bad\.model is not a tokenizer"):
        convert_checkpoint(tmp_path / "umt5.pth", tmp_path / "out.safetensors", "comfy", tmp_path / "bad.model")
    with pytest.raises(CheckpointError, match="--tokenizer is for a text encoder"):
        convert_checkpoint(tmp_path / "umt5.pth", tmp_path / "out.safetensors", "official", spiece)
    assert sorted(os.listdir(tmp_path)) == ["bad.model", "umt5.pth"]


def test_bad_requests(tmp_path: Path, vae_state: State) -> None:
    source = tmp_path / "vae.pth"
    torch.save(vae_state, source)
    write_tensors(tmp_path / "other" / "model-00001-of-00002.safetensors", {"x": torch.zeros(1)})
    refused = {
        ("out.safetensors", "gguf"): "no layout 'gguf'.*official, wan, diffusers, comfy, turbowan",
        ("out.gguf", "official"): r"out\.gguf: weights end in one of",
        ("vae.pth", "official"): "is the input itself",
        ("out.pth", "diffusers"): "reads no '.pth' files",
        ("other", "diffusers"): "holds other weights",
        ("other", "official"): "weights end in one of",
        ("vae.pth/out.pth", "official"): "cannot write",
    }
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for (name, to), message in refused.items():
        with pytest.raises(CheckpointError, match=message) as error:
            convert_checkpoint(source, tmp_path / name, to)
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_incomplete_files_are_not_converted(tmp_path: Path, transformer_state: Callable[..., State]) -> None:
    state = transformer_state("t2v")
    torch.save({k: v for k, v in state.items() if k != "blocks.1.ffn.2.bias"}, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=r"short\.pth.*1 tensors are missing \(e\.g\. blocks\.1\.ffn\.2\.bias"):
        convert_checkpoint(tmp_path / "short.pth", tmp_path / "out.safetensors", "comfy")
    assert os.listdir(tmp_path) == ["short.pth"]


def test_whole_pipelines_and_clip_are_refused(tmp_path: Path, vae_state: State) -> None:
    for part in ("transformer", "vae"):
        write_tensors(tmp_path / "pipe" / part / "diffusion_pytorch_model.safetensors", vae_state)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"pipe is a whole pipeline \(transformer, vae\); convert its parts"):
        convert_checkpoint(tmp_path / "pipe", tmp_path / "out.pth", "official")
    torch.save({"visual.patch_embedding.weight": torch.zeros(4, 3, 2, 2)}, tmp_path / "clip.pth")
    with pytest.raises(CheckpointError, match=r"clip\.pth is a Wan CLIP image encoder.*can be converted"):
        convert_checkpoint(tmp_path / "clip.pth", tmp_path / "out.pth", "official")
