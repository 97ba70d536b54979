"""From files to modules: what does not fit is refused in one line that says what was found and what was wanted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbowan import Engine
from turbowan.checkpoints import load_image_encoder, load_text_encoder, load_transformer, load_vae
from turbowan.checkpoints.load import embedded_tokenizer
from turbowan.errors import CheckpointError, RequestError

State = dict[str, Tensor]


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as error:
        load()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[str, State], Path]:
    def write(name: str, state: State) -> Path:
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return write


def test_sizes_come_from_the_tensors(transformer_state: Callable[..., State], save: Callable[..., Path]) -> None:
    net = load_transformer(save("x.pth", transformer_state("i2v-sla", dim=384, num_layers=3)))
    config = net.config
    assert (config.dim, config.ffn_dim, config.num_layers, config.num_heads) == (384, 384, 3, 3)
    assert (config.in_dim, config.out_dim, config.text_dim, config.freq_dim) == (36, 16, 64, 256)
    assert config.has_sla
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_float32_parts_stay_and_the_rest_takes_the_dtype(
    transformer_state: Callable[..., State], save: Callable[..., Path]
) -> None:
    net = load_transformer(save("x.pth", transformer_state("t2v-sla")), dtype=torch.bfloat16)
    dtypes = {key: value.dtype for key, value in net.state_dict().items()}
    assert net.dtype == torch.bfloat16
    assert dtypes["blocks.0.self_attn.norm_q.weight"] == torch.float32
    assert dtypes["blocks.0.self_attn.q.weight"] == torch.bfloat16
    assert dtypes["blocks.0.self_attn.proj_l.weight"] == torch.bfloat16


def test_attention_follows_the_request(
    transformer_state: Callable[..., State],
    save: Callable[..., Path],
    velocity: Callable[..., Tensor],
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    state = transformer_state("t2v-sla")
    path = save("sla.pth", state)
    bare = save("bare.pth", {key: value for key, value in state.items() if "proj_l" not in key})
    assert load_transformer(path).attention.kind == "sla"
    assert load_transformer(bare).attention.kind == "original"
    dense = velocity(path, attention="original")
    assert torch.equal(dense, velocity(bare))  # the projection is not used
    assert relative_error(velocity(path, attention="sla", sla_topk=0.3), dense) > 0.01
    net = load_transformer(path, attention="sagesla", sla_topk=0.3, block_q=64, block_k=128)
    how = net.attention
    assert (how.kind, how.top_k, how.block_q, how.block_k) == ("sagesla", 0.3, 64, 128)


def test_attention_that_cannot_be_had(transformer_state: Callable[..., State], save: Callable[..., Path]) -> None:
    path = save("x.pth", transformer_state("t2v"))
    for kind in ("sla", "sagesla"):
        assert refusal(lambda kind=kind: load_transformer(path, attention=kind)) == (
            f"{path} has no SLA projection (proj_l): it runs 'original' attention, not '{kind}'"
        )
    with pytest.raises(RequestError, match="attention must be one of auto, original, sla, sagesla, got 'flash'"):
        load_transformer(path, attention="flash")
    sla = save("sla.pth", transformer_state("t2v-sla"))
    with pytest.raises(RequestError, match=r"sla_topk must be in \(0, 1\], got 0"):
        load_transformer(sla, sla_topk=0)
    for options, message in (
        ({"norms": "fast"}, "norms must be one of exact, official, got 'fast'"),
        ({"block_q": 0}, "attention blocks must be positive, got 0 x 64"),
        ({"block_k": -64}, "attention blocks must be positive, got 128 x -64"),
    ):
        with pytest.raises(RequestError, match=message) as error:
            load_transformer(sla, **options)
        assert "\n" not in str(error.value)


def test_roles_are_not_mixed_up(
    transformer_state: Callable[..., State], vae_state: State, text_state: State, save: Callable[..., Path]
) -> None:
    transformer = save("transformer.pth", transformer_state("t2v"))
    vae, text = save("vae.pth", vae_state), save("text.pth", text_state)
    vae_line = refusal(lambda: load_transformer(vae))
    assert vae_line == f"{vae} is a Wan VAE (wan layout); a diffusion transformer is wanted here"
    assert "text encoder (wan layout); a VAE is wanted here" in refusal(lambda: load_vae(text))
    assert "a text encoder is wanted here" in refusal(lambda: load_text_encoder(transformer))
    assert "a CLIP image encoder is wanted here" in refusal(lambda: load_image_encoder(transformer))


def test_missing_and_extra_tensors(transformer_state: Callable[..., State], save: Callable[..., Path]) -> None:
    state = transformer_state("t2v")
    without = {key: value for key, value in state.items() if "ffn.2" not in key}
    path = save("missing.pth", without)
    line = refusal(lambda: load_transformer(path))
    assert line == f"{path} does not fit this model: 4 tensors are missing (e.g. blocks.0.ffn.2.bias)"
    path = save("extra.pth", {**state, "blocks.0.ffn.3.weight": torch.zeros(2), "step": torch.tensor(3)})
    line = refusal(lambda: load_transformer(path))
    assert line == f"{path} does not fit this model: 2 tensors are not part of it (e.g. blocks.0.ffn.3.weight)"
    path = save("both.pth", {**without, "zzz": torch.zeros(2)})
    assert "4 tensors are missing" in refusal(lambda: load_transformer(path))
    assert "1 tensors are not part of it (e.g. zzz)" in refusal(lambda: load_transformer(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_embedding.weight": None}, "patch_embedding.weight is missing among"),
        ({"head.head.bias": None}, "head.head.bias is missing among"),
        ({"patch_embedding.weight": (250, 64)}, "width 250, which is no multiple of the head size 128"),
        ({"patch_embedding.weight": (256,)}, r"patch_embedding.weight has shape \[256\], expected 2 dimensions"),
        ({"blocks.0.": None}, r"incomplete: of its blocks, \[0\] are missing"),
        ({"blocks.": None}, r"incomplete: of its blocks, \[0\] are missing"),
        ({"blocks.1.self_attn.attn_op.local_attn.proj_l.": None}, "SLA projections in 1 of 2 blocks; all or none"),
        ({"blocks.1.ffn.0.weight": (512, 256)}, r"has shape \[512, 256\], expected \[384, 256\] \(are files of two"),
        ({"text_embedding.0.weight": (256, 64, 1)}, r"has shape \[256, 64, 1\], expected 2 dimensions"),
    ],
)
def test_wrong_shapes(
    change: dict[str, tuple[int, ...] | None],
    message: str,
    transformer_state: Callable[..., State],
    save: Callable[..., Path],
) -> None:
    state = transformer_state("t2v-sla")
    ((start, shape),) = change.items()
    for key in [key for key in state if key.startswith(start)]:
        del state[key]
    if shape is not None:
        state[start] = torch.zeros(shape)
    path = save("x.pth", state)
    with pytest.raises(CheckpointError, match=message) as error:
        load_transformer(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_vaes_and_text_encoders(vae_state: State, text_state: State, save: Callable[..., Path]) -> None:
    path = save("vae.pth", {key: value for key, value in vae_state.items() if key != "encoder.conv1.weight"})
    assert "incomplete: encoder.conv1.weight is missing among 193 tensors" in refusal(lambda: load_vae(path))
    path = save("vae.pth", {**vae_state, "decoder.conv1.weight": torch.zeros(80, 16, 3, 3, 3)})
    assert "has widths 16 to 80 and 16 latent channels; Wan 2.1 has 16 to 64" in refusal(lambda: load_vae(path))
    path = save("vae.pth", {**vae_state, "conv1.weight": torch.zeros(8, 8, 1, 1, 1)})
    assert "conv1.weight has shape [8, 8, 1, 1, 1], expected [32, 32, 1, 1, 1]" in refusal(lambda: load_vae(path))
    path = save("text.pth", {key: value for key, value in text_state.items() if "blocks.0.attn.q" not in key})
    assert "SelfAttention.q.weight is missing" in refusal(lambda: load_text_encoder(path))
    path = save("text.pth", {key: value for key, value in text_state.items() if "blocks.1.ffn" not in key})
    assert "3 tensors are missing" in refusal(lambda: load_text_encoder(path))


def test_wrong_image_encoders(clip_state: Callable[[int], State], save: Callable[..., Path]) -> None:
    state = clip_state(128)
    path = save("clip.pth", {key: value for key, value in state.items() if "layers.1.mlp" not in key})
    assert "4 tensors are missing (e.g. " in refusal(lambda: load_image_encoder(path))
    path = save("clip.pth", {key: value for key, value in state.items() if "layers.0." not in key})
    assert "layers.0.mlp.fc1.weight is missing among" in refusal(lambda: load_image_encoder(path))
    path = save("clip.pth", {**state, "vision_model.encoder.layers.0.extra": torch.zeros(2)})
    assert "1 tensors are not part of it" in refusal(lambda: load_image_encoder(path))
    patch = "vision_model.embeddings.patch_embedding.weight"
    path = save("clip.pth", {**state, patch: torch.zeros(100, 3, 14, 14)})
    assert "has width 100, which is no multiple of the head sizes" in refusal(lambda: load_image_encoder(path))


def test_embedded_tokenizer_is_only_in_files_that_carry_it(
    text_state: State, save: Callable[..., Path], tmp_path: Path
) -> None:
    assert embedded_tokenizer(save("text.pth", text_state)) is None
    assert embedded_tokenizer(tmp_path) is None
    piece = torch.tensor([1, 2, 255], dtype=torch.uint8)
    assert embedded_tokenizer(save("comfy.pth", {**text_state, "spiece_model": piece})) == b"\x01\x02\xff"


class TestEngine:
    """The same through `Engine.load`, which sees from names and shapes that all parts fit before any weight is read."""

    @pytest.fixture
    def parts(self, text_state: State, vae_state: State, spiece: Path, save: Callable[..., Path]) -> dict[str, Path]:
        return {
            "vae": save("vae.pth", vae_state),
            "text_encoder": save("text.pth", text_state),
            "tokenizer": spiece,
        }

    def test_two_experts(
        self, parts: dict[str, Path], transformer_state: Callable[..., State], save: Callable[..., Path]
    ) -> None:
        high, low = (save(f"{name}.pth", transformer_state("i2v-sla")) for name in ("high", "low"))
        engine = Engine.load(high_noise=high, low_noise=low, device="cpu", **parts)
        assert engine.manifest.family == "turbo-i2v"
        assert engine.manifest.two_experts

    def test_experts_of_different_sizes(
        self, parts: dict[str, Path], transformer_state: Callable[..., State], save: Callable[..., Path]
    ) -> None:
        """As a 1.3B expert with one of A14B: widths, depths and input channels differ."""
        high = save("a14b.pth", transformer_state("i2v-sla", dim=384, num_layers=3))
        low = save("1.3b.pth", transformer_state("t2v-sla"))
        assert refusal(lambda: Engine.load(high_noise=high, low_noise=low, **parts)) == (
            f"the two experts differ (dim 384 and 256, num_layers 3 and 2, in_dim 36 and 16): {high}, {low}"
        )

    def test_an_expert_put_together_of_two_sizes(
        self, parts: dict[str, Path], transformer_state: Callable[..., State], save: Callable[..., Path]
    ) -> None:
        small, large = transformer_state("t2v-sla"), transformer_state("t2v-sla", dim=384)
        mixed = {key: (large if key.startswith("blocks.1.") else small)[key] for key in small}
        path = save("mixed.pth", mixed)
        line = refusal(lambda: load_transformer(path))
        assert line.startswith(f"{path}: blocks.1.")
        assert "(are files of two sizes mixed?)" in line

    def test_image_encoders(
        self,
        parts: dict[str, Path],
        transformer_state: Callable[..., State],
        clip_state: Callable[[int], State],
        save: Callable[..., Path],
    ) -> None:
        """Its tensors are seen before any work, and its width is the transformer's; where none is taken, one may be."""
        takes, takes_none = save("i2v.pth", transformer_state("i2v-2.1")), save("t2v.pth", transformer_state("t2v"))
        good, wide = save("clip.pth", clip_state(128)), save("wide.pth", clip_state(192))
        state = clip_state(128)
        del state["vision_model.encoder.layers.1.mlp.fc2.bias"]
        short = save("short.pth", state)
        assert Engine.load(transformer=takes, image_encoder=good, device="cpu", **parts).config.image_dim == 128
        assert Engine.load(transformer=takes_none, image_encoder=wide, device="cpu", **parts).config.image_dim is None
        assert refusal(lambda: Engine.load(transformer=takes, image_encoder=wide, **parts)) == (
            f"the image encoder {wide} gives width 192, but the transformer takes image tokens of width 128"
        )
        for path in (takes, takes_none):
            line = refusal(lambda path=path: Engine.load(transformer=path, image_encoder=short, **parts))
            assert "1 tensors are missing" in line
        assert "takes CLIP image tokens" in refusal(lambda: Engine.load(transformer=takes, **parts))

    def test_bad_parts(
        self, parts: dict[str, Path], transformer_state: Callable[..., State], save: Callable[..., Path], tmp_path: Path
    ) -> None:
        good = save("good.pth", transformer_state("t2v"))
        empty, cut = tmp_path / "empty.pth", tmp_path / "cut.pth"
        empty.write_bytes(b"")
        cut.write_bytes(good.read_bytes()[:100_000])
        state = torch.load(good)
        state.pop("blocks.1.norm3.bias")
        short = save("short.pth", state)
        assert "(e.g. blocks.1.norm3.bias)" in refusal(lambda: Engine.load(transformer=short, **parts))
        assert "empty (0 bytes)" in refusal(lambda: Engine.load(transformer=empty, **parts))
        assert "100,000 bytes" in refusal(lambda: Engine.load(transformer=cut, **parts))
        assert "does not exist" in refusal(lambda: Engine.load(transformer=tmp_path / "no.pth", **parts))
        swapped = {**parts, "vae": parts["text_encoder"]}
        assert "a VAE is wanted here" in refusal(lambda: Engine.load(transformer=good, **swapped))
        assert "a diffusion transformer is wanted" in refusal(lambda: Engine.load(transformer=parts["vae"], **parts))
        lora = save("lora.pth", {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.zeros(4, 4)})
        assert "is a LoRA, not a Wan model" in refusal(lambda: Engine.load(transformer=lora, **parts))
        wide = {**transformer_state("t2v"), "text_embedding.0.weight": torch.zeros(256, 4096)}
        path = save("wide.pth", wide)
        line = refusal(lambda: Engine.load(transformer=path, **parts))
        assert "64" in line
        assert "4096" in line
