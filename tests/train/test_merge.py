"""The update of one training added to another model: every tensor against the formula, in any mix of layouts."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbowan.checkpoints import load_transformer
from turbowan.checkpoints.convert import LAYOUTS
from turbowan.checkpoints.detect import detect
from turbowan.checkpoints.families import WRITERS
from turbowan.checkpoints.files import read_tensors, write_tensors
from turbowan.checkpoints.load import read
from turbowan.checkpoints.quantize import quantize_transformer
from turbowan.errors import CheckpointError
from turbowan.models.transformer import TransformerConfig, WanTransformer
from turbowan.train.merge import merge_checkpoints

State = dict[str, Tensor]
PATCH = "patch_embedding.weight"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def make_state(fresh_seed: int) -> Callable[..., State]:
    """A random transformer under our names; norms in float32, the rest in the dtype given."""

    def make(dtype: torch.dtype = torch.bfloat16, **sizes: object) -> State:
        config = {"dim": 128, "ffn_dim": 192, "num_layers": 2, "text_dim": 48, **sizes}
        state = WanTransformer(TransformerConfig(**config)).state_dict()
        state = {key: value + 0.1 * torch.randn_like(value) for key, value in state.items()}
        return {key: value.to(torch.float32 if "norm" in key else dtype) for key, value in state.items()}

    return make


def save(state: State, path: Path, layout: str, prefix: str = "") -> Path:
    """A state under our names as a file of a layout; for diffusers in the folder of that name."""
    written = {prefix + key: value for key, value in WRITERS["transformer", layout](state).items()}
    write_tensors(path / "diffusion_pytorch_model.safetensors" if layout == "diffusers" else path, written)
    return path


def assert_merged(result: State, base: State, before: State, after: State, weight: float) -> None:
    """The formula in float64, to one rounding in the base's dtype and one in float32."""
    for key, value in result.items():
        assert value.dtype == base[key].dtype, key
        exact = base[key].double() + weight * (after[key].double() - before[key].double())
        largest = torch.stack([x[key].double().abs() for x in (base, before, after)]).amax(dim=0) * (1 + abs(weight))
        bound = torch.finfo(value.dtype).eps * exact.abs() / 2 + 4 * torch.finfo(torch.float32).eps * largest
        assert ((value.double() - exact).abs() <= bound + torch.finfo(value.dtype).tiny).all(), key
        assert not torch.equal(value, base[key]), key


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("families", [("official", "wan", "diffusers"), ("comfy", "turbowan", "official"),
                                      ("diffusers", "comfy", "wan")])  # fmt: skip
def test_every_tensor_follows_the_formula(
    families: tuple[str, ...], to: str, tmp_path: Path, make_state: Callable[..., State]
) -> None:
    dtypes = random.Random(torch.initial_seed()).choices(DTYPES, k=3)
    states = [make_state(dtype) for dtype in dtypes]
    weight = random.Random(torch.initial_seed()).choice((-1, 1)) * float(torch.empty(1).uniform_(0.3, 4))
    suffixes = {"wan": ".safetensors", "comfy": ".safetensors", "diffusers": ""}
    files = [
        save(state, tmp_path / f"{i}{suffixes.get(family, '.pth')}", family)
        for i, (state, family) in enumerate(zip(states, families, strict=True))
    ]
    out = tmp_path / ("out" if to == "diffusers" else "out.safetensors")
    report = merge_checkpoints(*files, out, weight, to)
    state, _ = read(out)
    expected = WRITERS["transformer", to](states[0])
    assert {key: value.shape for key, value in read_tensors(out).items()} == {k: v.shape for k, v in expected.items()}
    assert set(state) == set(states[0]) == set(report.updated)
    assert_merged(state, *states, weight)
    assert (list(report.kept), list(report.copied)) == ([], [])
    names = ["diffusion_pytorch_model.safetensors", "config.json"] if to == "diffusers" else []
    assert report.files == ([out / name for name in names] or [out])
    assert all(path.exists() for path in report.files)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_is_the_bases_own_unless_told(layout: str, tmp_path: Path, make_state: Callable[..., State]) -> None:
    base = save(make_state(), tmp_path / f"base{'' if layout == 'diffusers' else '.safetensors'}", layout)
    diffs = [save(make_state(), tmp_path / f"{i}.pth", "official") for i in range(2)]
    merge_checkpoints(base, *diffs, tmp_path / "merged.safetensors")
    merged, source = (read_tensors(path) for path in (tmp_path / "merged.safetensors", base))
    assert detect(merged) == detect(source)
    assert {k: (v.shape, v.dtype) for k, v in merged.items()} == {k: (v.shape, v.dtype) for k, v in source.items()}


def test_sla_onto_an_image_to_video_expert(tmp_path: Path, make_state: Callable[..., State]) -> None:
    """A T2V training for a 36-channel base: its patch embedding stays, proj_l comes along, all else moves."""
    base, before = make_state(torch.float16, in_dim=36), make_state(torch.float32)
    after = make_state(has_sla=True)
    files = [
        save(base, tmp_path / "base.pth", "wan"),
        save(before, tmp_path / "before.safetensors", "official"),
        save(after, tmp_path / "after.pth", "official", prefix="net."),
    ]
    report = merge_checkpoints(*files, tmp_path / "merged.pth", to="official")
    state, found = read(tmp_path / "merged.pth")
    projections = {key for key in after if "proj_l" in key}
    assert len(projections) == 4
    assert found.family == "official"
    assert set(state) == set(base) | projections
    assert torch.equal(state[PATCH], base[PATCH])
    assert all(torch.equal(state[key], after[key]) and state[key].dtype == after[key].dtype for key in projections)
    moved = {key: value for key, value in state.items() if key in base and key != PATCH}
    assert_merged(moved, base, before, after, 1.0)
    assert (set(report.updated), list(report.kept), set(report.copied)) == (set(moved), [PATCH], projections)
    assert str(report) == (
        f"{len(moved)} tensors updated, 1 (e.g. {PATCH}) kept from the base,"
        " 4 (e.g. blocks.0.self_attn.proj_l.weight) copied from the diff target"
    )
    net = load_transformer(tmp_path / "merged.pth")
    assert net.config.has_sla
    assert net.condition_channels == 20


def test_what_the_diffs_lack_is_kept(tmp_path: Path, make_state: Callable[..., State]) -> None:
    """A Wan 2.1 image-to-video base with SLA: neither its image layers nor its proj_l are in the T2V files."""
    base = make_state(in_dim=36, image_dim=64, has_sla=True)
    before, after = make_state(), make_state(has_sla=True)
    files = [save(state, tmp_path / f"{i}.pth", "official") for i, state in enumerate((base, before, after))]
    report = merge_checkpoints(*files, tmp_path / "merged.safetensors")
    state, _ = read(tmp_path / "merged.safetensors")
    own = {key for key in base if "img" in key or "proj_l" in key} | {PATCH}
    assert len(own) > 15
    assert set(report.kept) == own
    assert all(torch.equal(state[key], base[key]) for key in own)
    assert_merged({key: value for key, value in state.items() if key not in own}, base, before, after, 1.0)


def test_no_weight_gives_the_base_and_progress_counts(tmp_path: Path, make_state: Callable[..., State]) -> None:
    files = [save(make_state(), tmp_path / f"{i}.pth", "official") for i in range(3)]
    seen: list[tuple[int, int]] = []
    merge_checkpoints(*files, tmp_path / "out.pth", 0.0, progress=lambda *at: seen.append(at))
    merged, base = read_tensors(tmp_path / "out.pth"), read_tensors(files[0])
    assert all(torch.equal(merged[key], base[key]) for key in base)
    assert seen == [(done, len(base)) for done in range(1, len(base) + 1)]


def test_what_is_refused(tmp_path: Path, make_state: Callable[..., State]) -> None:
    plain = make_state()
    key = "blocks.1.ffn.2.weight"
    big = {**make_state(torch.float16), key: torch.full((128, 192), 6e4).half()}
    for name, state in {
        "base": plain,
        "plain": make_state(),
        "wide": make_state(dim=256),
        "deep": make_state(num_layers=3),
        "blocks": quantize_transformer(plain),
        "fp8": {**plain, key: plain[key].to(torch.float8_e4m3fn)},
        "short": {name: value for name, value in plain.items() if name != key},
        "nan": {**plain, key: plain[key].index_fill(0, torch.tensor([3]), float("nan"))},
        "big": big,
        "zero": {**plain, key: torch.zeros_like(plain[key])},
    }.items():
        save(state, tmp_path / f"{name}.pth", "official")
    (tmp_path / "text.pth").write_text("no weights")
    refused = {
        ("base", "plain", "wide", "out.pth"):
            r"wide\.pth \(width 256, hidden 192, 2 blocks, text 48\).*base .*\(width 128, hidden 192, 2 blocks",
        ("base", "deep", "plain", "out.pth"): r"deep\.pth \(.*3 blocks.*another size than the base.*2 blocks",
        ("blocks", "base", "plain", "out.pth"): r"blocks\.pth is .*int8_block.*full-precision",
        ("base", "plain", "fp8", "out.pth"): r"fp8\.pth is .*fp8.*full-precision",
        ("base", "plain", "short", "out.pth"): r"short\.pth.*1 tensors are missing \(e\.g\. blocks\.1\.ffn\.2\.weight",
        ("base", "text", "plain", "out.pth"): r"text\.pth.*damaged",
        ("base", "plain", "gone", "out.pth"): r"gone\.pth does not exist",
        ("base", "plain", "plain", "out.pth"): r"both .*plain\.pth: there is no update",
        ("base", "plain", "zero", "plain.pth"): r"plain\.pth is the input itself",
        ("base", "plain", "zero", "out.bin.gz"): r"weights end in one of",
        ("base", "plain", "nan", "out.safetensors"): r"ffn\.2\.weight: 192 of 24,576 merged values are NaN.* bfloat16",
        ("big", "zero", "big", "out.safetensors"): r"24,576 of 24,576 merged values are NaN or Inf in float16.*weight",
    }  # fmt: skip
    before = sorted(os.listdir(tmp_path))
    for (*names, out), message in refused.items():
        with pytest.raises(CheckpointError, match=message) as error:
            merge_checkpoints(*(tmp_path / f"{name}.pth" for name in names), tmp_path / out)
        assert "\n" not in str(error.value)
    inputs = [tmp_path / f"{name}.pth" for name in ("base", "plain", "zero")]
    for weight in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match=r"finite number, got (nan|inf)"):
            merge_checkpoints(*inputs, tmp_path / "out.pth", weight)
    with pytest.raises(CheckpointError, match="no layout 'keras'"):
        merge_checkpoints(*inputs, tmp_path / "out.pth", to="keras")
    assert sorted(os.listdir(tmp_path)) == before
