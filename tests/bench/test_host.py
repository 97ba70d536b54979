"""What is said of the host is true of calls made to show it."""

import re

import pytest
import torch

from turbowan.bench.host import _place, graph_facts, host_facts, waits
from turbowan.bench.step import Step
from turbowan.errors import RequestError

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_place_is_the_last_of_the_package():
    with pytest.raises(RequestError) as inside:
        Step("480p", 80)
    assert re.fullmatch(r" \(request\.py:\d+\)", _place(inside.value))
    with pytest.raises(ZeroDivisionError) as outside:
        divmod(1, 0)
    assert _place(outside.value) == ""


class TestOnGPU:
    pytestmark = gpu

    def test_a_wait_is_named(self):
        x = torch.randn(64, 64, device="cuda")
        assert waits(lambda: x @ x) is False
        assert "synchronizing" in waits(lambda: x.sum().item())
        assert "synchronizing" in waits(lambda: torch.zeros(8).cuda())  # from memory that is not pinned
        assert torch.cuda.get_sync_debug_mode() == 0

    def test_time_and_memory_of_the_host(self):
        x = torch.randn(4096, 4096, device="cuda")
        busy = host_facts(lambda: [x @ x for _ in range(20)])
        assert busy.keys() == {"host_ms", "new_memory_mib", "waits"}
        assert 0 < busy["host_ms"] < 20  # the products take longer (2.7 TFLOP in float32), asking for them far less
        assert (busy["new_memory_mib"], busy["waits"]) == (0, False)
        kept = []
        grown = host_facts(lambda: kept.append(torch.empty(64 << 20, dtype=torch.int8, device="cuda")), repeats=3)
        assert grown["new_memory_mib"] == 3 * 64

    def test_a_graph_gives_what_the_call_gave_or_says_why_not(self):
        x = torch.randn(512, 512, device="cuda")
        assert 0 < graph_facts(lambda: (x @ x).relu().sum(dim=0), 3)["graph_ms"] < 100
        assert "synchronizing" in graph_facts(lambda: x * x.sum().item(), 3)["graph_failed"]
        counter = torch.zeros(1, device="cuda")
        assert "another result" in graph_facts(lambda: counter.add_(1).clone(), 3)["graph_failed"]
