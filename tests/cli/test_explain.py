"""`generate --explain` and `doctor --gpu-budget`: plans, told before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from turbowan.engine import Engine
from turbowan.memory.plan import STAGES
from turbowan.stages import LOADERS


def test_the_plan_as_a_table_and_nothing_else(command_line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be loaded")

    for role in ("transformer", "vae", "text_encoder"):
        monkeypatch.setitem(LOADERS, role, load)
    target = tmp_path / "video.mp4"
    request = "generate", "-p", "a ring", "--device", "cpu", "--explain", "-o", target
    code, out, _ = command_line(*request, "--memory", "minimal")
    assert code == 0
    assert out.startswith("Memory minimal: ")
    for word in ("transformer", "text encoder", "vae", "read anew for each request", "denoise", "decode", "usable"):
        assert word in out
    assert not list(tmp_path.iterdir())
    code, out, _ = command_line(*request, "--json")
    plan = json.loads(out)
    assert set(plan["peaks"]) == set(STAGES)
    assert plan["places"]["vae"]["home"] == "gpu"
    sizes = Engine.load("tiny", device="cpu").part_sizes(torch.float32)
    assert {role: place["bytes"] for role, place in plan["places"].items()} == {r: s.total for r, s in sizes.items()}


def test_what_cannot_fit_ends_with_exit_code_2_and_one_line(command_line) -> None:
    code, out, err = command_line("generate", "-p", "a ring", "--device", "cpu", "--gpu-budget", "10MB", "--explain")
    assert code == 2
    assert not out
    assert err.count("\n") == 1
    assert "in the budget, less a margin" in err


def test_doctor_plans_for_a_card_that_is_not_here(command_line) -> None:
    _, out, _ = command_line("doctor", "--gpu-budget", "16GB")
    lines = [line for line in out.splitlines() if "A14B-I2V int8" in line]
    assert len(lines) == 2
    assert all("of 40 blocks stay while in use" in line for line in lines)
    _, out, _ = command_line("doctor", "--gpu-budget", "16GB", "--json")
    plans = json.loads(out)["plans"]
    assert all(plan["peak"] is None or plan["peak"] < 15.5e9 for plan in plans)
