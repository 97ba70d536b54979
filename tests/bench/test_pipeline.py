"""`bench pipeline` on a small model: the process, its records, and what it says of memory."""

import json
import time

import pytest
import torch

from turbowan.bench.memory_watch import MemoryWatch, host_memory
from turbowan.bench.pipeline import Trial, run_pipeline
from turbowan.bench.presets import PRESETS, PROMPT, write_model
from turbowan.clock import STAGES


@pytest.fixture
def trial(tmp_path):
    manifest, home = write_model(tmp_path, PRESETS["tiny-I2V"])
    request = {"prompt": PROMPT, "width": 64, "height": 48, "num_frames": 5, "num_steps": 3, "attention": "sla"}
    return Trial(manifest, home, request, "cpu", (64, 48), warm=2, first_ever=False, facts={"preset": "tiny-I2V"})


def test_records(trial):
    files, cold, warm = (json.loads(json.dumps(record)) for record in run_pipeline(trial))
    assert files["run"] == "files"
    assert files["gb"] == pytest.approx(
        sum(p.stat().st_size for p in trial.manifest.files.values() if p.is_file()) / 1e9, abs=1e-3
    )
    assert (cold["run"], warm["run"]) == ("cold", "warm")
    for record in (cold, warm):
        assert record["case"] == "random-Atiny-I2V-int8_block 64x48x5"
        assert set(record["seconds"]) == set(STAGES)
        assert record["file_mb"] is not None
        assert record["linears"] == "int8_block"
        assert record["preset"] == "tiny-I2V"
    assert cold["seconds"]["load"] > 0 == warm["seconds"]["load"]
    assert 0 < cold["marks_s"]["imports"] < cold["marks_s"]["engine"] < cold["start_to_file_s"]
    assert cold["seconds"]["total"] < cold["start_to_file_s"]
    assert warm["runs"] == 2
    assert warm["ms"]["p20"] <= warm["ms"]["p50"] <= warm["ms"]["p80"]
    assert warm["seconds"]["total"] == pytest.approx(warm["ms"]["p50"] / 1e3, rel=0.5)
    assert len(warm["host_own_gib"]) == 3
    assert warm["peak_gib"]["host"] > 0


def test_a_refusal_is_a_record(trial):
    trial.request.update(memory="speed", gpu_budget="1MB")
    _, refused = run_pipeline(trial)
    assert refused["run"] == "refused"
    assert "1.0 MB" in refused["why"]
    assert refused["case"].endswith("speed 1MB")


def test_host_memory_sees_an_allocation():
    before = host_memory()
    if not before:
        pytest.skip("this system does not tell")
    held = torch.ones(50_000_000)
    assert host_memory()["own"] - before["own"] == pytest.approx(held.nbytes, rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_watch_sees_the_devices_memory():
    device = torch.device("cuda")
    torch.ones(1, device=device)
    watch = MemoryWatch(device)
    held = torch.empty(2 << 30, dtype=torch.uint8, device=device)
    time.sleep(0.1)
    del held
    torch.cuda.empty_cache()
    assert watch.peak() == pytest.approx(2 << 30, rel=0.05)
    time.sleep(0.1)
    assert watch.peak() < 1 << 28
    watch.close()
