"""What a file is, told from its keys and shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbowan.checkpoints.convert import convert_checkpoint
from turbowan.checkpoints.detect import Detected, detect
from turbowan.checkpoints.files import read_tensors
from turbowan.checkpoints.quantize import quantize_transformer
from turbowan.errors import CheckpointError

State = dict[str, Tensor]


@pytest.mark.parametrize(
    ("kind", "to", "family"),
    [
        ("t2v", "official", "official"),
        ("t2v-sla", "official", "official"),
        ("t2v-sla", "turbowan", "turbowan"),
        ("t2v", "wan", "wan"),
        ("i2v-2.1", "wan", "wan"),
        ("i2v", "diffusers", "diffusers"),
        ("i2v-2.1", "comfy", "comfy"),
    ],
)
def test_transformers(
    kind: str, to: str, family: str, tmp_path: Path, transformer_state: Callable[..., State]
) -> None:
    torch.save(transformer_state(kind), tmp_path / "in.pth")
    convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.safetensors", to)
    assert detect(read_tensors(tmp_path / "out.safetensors")) == Detected("transformer", family, "none")


def test_quantised_transformers(transformer_state: Callable[..., State]) -> None:
    state = transformer_state("t2v-sla")
    found = detect(quantize_transformer(state))
    assert found == Detected("transformer", "official", "int8_block")
    assert str(found) == "a Wan diffusion transformer (official layout, int8_block)"
    key = "blocks.0.ffn.0.weight"
    eight = {**state, key: state[key].to(torch.float8_e4m3fn)}
    assert detect(eight).quantization == "fp8"
    assert detect({**eight, "scaled_fp8": torch.zeros(2)}).family == "comfy"
    assert detect({**eight, f"{key}_scale": torch.ones(384, 1)}).family == "lightx2v"
    rows = {**state, key: torch.ones(384, 256, dtype=torch.int8), f"{key}_scale": torch.ones(384, 1)}
    assert detect(rows) == Detected("transformer", "lightx2v", "int8_row")
    assert detect({f"model.diffusion_model.{k}": v for k, v in rows.items()}).family == "comfy"


def test_the_other_roles(tmp_path: Path, vae_state: State, text_state: State, spiece: Path) -> None:
    torch.save(vae_state, tmp_path / "vae.pth")
    torch.save(text_state, tmp_path / "text.pth")
    for source, role, families in (
        ("vae.pth", "vae", {"official": "wan", "diffusers": "diffusers", "comfy": "wan"}),
        ("text.pth", "text_encoder", {"official": "wan", "diffusers": "transformers", "comfy": "comfy"}),
    ):
        for to, family in families.items():
            out = tmp_path / f"{role}-{to}.safetensors"
            convert_checkpoint(tmp_path / source, out, to, spiece if (role, to) == ("text_encoder", "comfy") else None)
            assert detect(read_tensors(out)) == Detected(role, family, "none")


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"vace_blocks.0.after_proj.weight": (256, 256)}, "Wan VACE"),
        ({"vace_patch_embedding.weight": (256, 96, 1, 2, 2)}, "Wan VACE"),
        ({"face_adapter.fuser_blocks.0.linear1_kv.weight": (512, 256)}, "Wan 2.2 Animate"),
        ({"pose_patch_embedding.weight": (256, 16, 1, 2, 2)}, "Wan 2.2 Animate"),
        ({"casual_audio_encoder.weights": (1, 25, 1, 1)}, "Wan 2.2 S2V"),
        ({"audio_injector.injector.0.q.weight": (256, 256)}, "Wan 2.2 S2V"),
        ({"img_emb.emb_pos": (1, 514, 1280)}, "first-and-last-frame"),
        ({"head.head.weight": (192, 256)}, "TI2V-5B"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "net."])
def test_families_we_do_not_run(
    keys: dict[str, tuple[int, ...]], name: str, prefix: str, transformer_state: Callable[..., State]
) -> None:
    state = {**transformer_state("t2v"), **{key: torch.zeros(shape) for key, shape in keys.items()}}
    with pytest.raises(CheckpointError, match=f"x.pth is .*{name}.*which turbowan does not run") as error:
        detect({prefix + key: value for key, value in state.items()}, "x.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"vace_blocks.0.proj_out.weight": (256, 256)}, "Wan VACE"),
        ({"motion_encoder.motion_network.0.weight": (256, 256)}, "Wan 2.2 Animate"),
        ({"condition_embedder.image_embedder.pos_embed": (1, 514, 1280)}, "first-and-last-frame"),
        ({"proj_out.weight": (192, 256)}, "TI2V-5B"),
    ],
)
def test_diffusers_families_we_do_not_run(keys: dict[str, tuple[int, ...]], name: str) -> None:
    known = {"condition_embedder.time_proj.weight": (1536, 256), "proj_out.weight": (64, 256)}
    state = {key: torch.zeros(shape) for key, shape in {**known, **keys}.items()}
    with pytest.raises(CheckpointError, match=f"{name}.*which turbowan does not run"):
        detect(state, "x.safetensors")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "a Flux or HunyuanVideo model"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "a Flux or HunyuanVideo model"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a Stable Diffusion model"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "a Stable Diffusion 3 model"),
        ("model.layers.0.self_attn.q_proj.weight", "a language model"),
        ("diffusion_model.blocks.0.self_attn.q.lora_down.weight", "a LoRA"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", "a LoRA"),
    ],
)
def test_other_peoples_files(key: str, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"x.safetensors is {name}, not a Wan model, VAE or text encoder"):
        detect({key: torch.zeros(4, 4)}, "x.safetensors")


def test_the_vae_of_the_5b_model(vae_state: State) -> None:
    nested = {"decoder.upsamples.0.upsamples.0.residual.0.gamma": torch.zeros(4, 1, 1, 1)}
    wide = {"decoder.conv1.weight": torch.zeros(64, 48, 3, 3, 3)}
    for extra in (nested, wide):
        with pytest.raises(CheckpointError, match=r"Wan 2\.2 VAE of the 5B model \(48 channels\)"):
            detect({**vae_state, **extra})


def test_unknown_files_show_what_they_hold() -> None:
    with pytest.raises(CheckpointError, match=r"x\.pth is no Wan checkpoint: 4 tensors, the first ones a, b, c"):
        detect({key: torch.zeros(1) for key in "abcd"}, "x.pth")
