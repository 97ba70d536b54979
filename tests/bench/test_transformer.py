"""Which steps are timed, what bounds them, and the picture of their growth."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from turbowan.bench.step import Step, growth
from turbowan.bench.transformer import bench_config, run_transformer, step_bound, step_flops
from turbowan.models.transformer import AttentionConfig, TransformerConfig, WanTransformer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "growth.py"


def test_steps_that_grow():
    steps = growth(Step(), ["tokens", "top-k"])
    assert [step.tokens for step in steps[:5]] == [9360, 20280, 32760, 75600, 111600]
    assert [step.top_k for step in steps[5:]] == [0.05, 0.2, 0.3, 0.5]  # 0.1 was there
    assert {step.tokens for step in steps[5:]} == {32760}
    assert len({step.name for step in steps}) == 9
    assert steps[2].name == "832x480"
    assert steps[0].latent == (6, 60, 104)
    assert growth(Step("720p", 5, 0.3), []) == [Step("720p", 5, 0.3)]


def test_products_are_those_of_the_blocks():
    """Against PyTorch's own count, which sees the linear layers and no attention."""
    config = TransformerConfig(dim=256, ffn_dim=384, num_layers=3, text_dim=32, has_sla=True)
    net = WanTransformer(config, AttentionConfig("original")).eval()
    with torch.inference_mode():
        context = net.tell(torch.randn(1, 4, 32))
        with FlopCounterMode(display=False) as counter:
            net(torch.randn(1, 16, 2, 10, 14), torch.ones(1), context)
    counts = counter.get_flop_counts()
    counted = sum(sum(counts[f"WanTransformer.blocks.{i}"].values()) for i in range(3))
    tokens = 2 * 5 * 7
    linears, own, both = step_flops(config, tokens, "original", 0.1)
    assert linears == counted
    assert own == 4 * tokens * 3 * 256 * (tokens + 512)
    assert both == linears + own


def test_the_bound_grows_as_the_products_do():
    config = bench_config("14B")
    bound = lambda step, *how: step_bound(config, step.tokens, how[0], step.top_k, how[1])  # noqa: E731
    for vary in ("tokens", "top-k"):
        for how in (("sla", "int8"), ("sagesla", "fp8"), ("sla", "bf16")):
            bounds = [bound(step, *how) for step in growth(Step(), [vary])]
            assert bounds == sorted(bounds)
    few, many = bound(Step("480p", 21), "sla", "int8"), bound(Step("480p", 161), "sla", "int8")
    assert 41 / 6 < many / few < (41 / 6) ** 2  # between the linear layers' growth and attention's
    assert bound(Step(), "sagesla", "int8") < bound(Step(), "sla", "int8") < bound(Step(), "sla", "bf16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_records():
    steps = [Step("480p", 5), Step("480", 9, 0.3)]
    records = list(run_transformer("tiny", steps, repeats=3, graph=True))
    assert [record["shape"]["tokens"] for record in records] == [step.tokens for step in steps]
    assert [record["case"] for record in records] == [
        "tiny 832x480 5 frames int8 sla", "tiny 768x432 9 frames top-k 0.3 int8 sla",
    ]  # fmt: skip
    for record in records:
        assert record["new_memory_mib"] == 0
        assert record["waits"] is False
        assert record["graph_ms"] > 0
        assert "graph_failed" not in record
        assert 0 <= record["share_of_bound"] < 1  # three digits of very little
        assert record["host_ms"] > 0
        json.dumps(record)


# --- the picture ------------------------------------------------------------------------------------------------------


def record(size, step, gpu="G", precision="int8", slower=2.0):
    bound = step_bound(bench_config(size), step.tokens, "sla", step.top_k, precision) * 1e3
    return {
        "bench": "transformer", "case": f"{size} {step.name} {precision} sla", "gpu": gpu, "size": size,
        "precision": precision, "attention": "sla", "shape": {"tokens": step.tokens, "top_k": step.top_k},
        "ms": {"p50": slower * bound}, "bound_ms": bound,
    }  # fmt: skip


def draw(path, records, monkeypatch):
    """The script's exit code."""
    path.write_text("".join(json.dumps(line) + "\n" for line in records), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return end.value.code


def test_the_picture_shows_times_above_their_bound(tmp_path, monkeypatch):
    records = [record(size, step) for size in ("1.3B", "14B") for step in growth(Step(), ["tokens", "top-k"])]
    failed = record("14B", Step("720p", 161))
    records.append({key: value for key, value in failed.items() if key != "ms"} | {"failed": "out of memory"})
    assert draw(tmp_path / "some.jsonl", records, monkeypatch) == 0
    picture = Image.open(tmp_path / "growth.png").convert("RGB")
    assert picture.size == (1280, 760)
    pixels = np.asarray(picture, dtype=int)
    for left, top in ((0, 0), (640, 0), (0, 380), (640, 380)):
        panel = pixels[top + 70 : top + 351, left : left + 640]  # below the legend, down to the frame
        heights = {}
        for name, colour in (("time", (20, 70, 160)), ("bound", (161, 181, 217))):
            rows, columns = np.nonzero(np.abs(panel - np.array(colour)).sum(axis=2) == 0)
            middle = (columns > 300) & (columns < 360)
            heights[name] = 280 - rows[middle].mean()
        assert heights["time"] == pytest.approx(2 * heights["bound"], rel=0.05)


def test_what_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    def refusal(*records):
        assert draw(tmp_path / "some.jsonl", records, monkeypatch) == 2
        assert not (tmp_path / "growth.png").exists()
        return capsys.readouterr().err

    assert "found none" in refusal({"bench": "op norm", "case": "a", "gpu": "G", "ms": {"p50": 1.0}})
    assert "found G and H" in refusal(record("14B", Step()), record("14B", Step(top_k=0.2), gpu="H"))
    assert "no curve" in refusal(record("14B", Step()), record("1.3B", Step("720p")))


def test_the_picture_of_the_recorded_steps(tmp_path, monkeypatch):
    recorded = SCRIPT.parent / "results" / "nvidia-h200" / "transformer.jsonl"
    lines = [json.loads(line) for line in recorded.read_text(encoding="utf-8").splitlines()]
    assert draw(tmp_path / "some.jsonl", lines, monkeypatch) == 0
    assert Image.open(tmp_path / "growth.png").size == (1280, 760)
