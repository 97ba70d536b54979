"""Weights lent to a block for its turn: what it computes with, and that everything is back in its place after."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from turbowan.memory.lending import ALIGNMENT, Lender, packed, pin

pytestmark = pytest.mark.usefixtures("fresh_seed")


class Net(nn.Module):
    """Blocks, a layer beside them, and a weight that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.rand(8))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.scale
        for block in self.blocks:
            x = block(x)
        return x


def weights(net: nn.Module) -> dict[str, int]:
    return {name: id(weight) for name, weight in net.named_parameters()}


def test_nothing_is_copied_where_weights_lie_beside_the_input() -> None:
    net = Net()
    before, x = weights(net), torch.randn(2, 8)
    wanted = net(x)
    seen = []
    Lender([net, *net.blocks], before=lambda: seen.append(weights(net)))
    assert torch.equal(net(x), wanted)
    assert seen == [before] * 4  # the whole, then each block


def test_an_adjusted_weight_is_used_and_the_own_one_is_back_after() -> None:
    net, x = Net(), torch.randn(2, 8)
    before = weights(net)
    doubled = Net()
    doubled.load_state_dict({k: 2 * v if k.startswith("blocks.1.0.weight") else v for k, v in net.state_dict().items()})

    def twice(module: nn.Module, name: str, weight: Tensor) -> Tensor:
        return weight * 2 if name == "weight" else weight

    Lender([net, *net.blocks], twice, lambda module: module is net.blocks[1][0])
    assert torch.equal(net(x), doubled(x))
    assert weights(net) == before
    assert torch.equal(net(x), doubled(x))  # the own weight is not changed


def test_a_network_goes_with_its_last_reference() -> None:
    """At once, not when Python next looks for cycles: it may hold many gigabytes."""
    net = Net()
    Lender([net, *net.blocks], lambda _, __, w: w * 2, lambda _: True)
    net(torch.randn(2, 8))
    gone = weakref.ref(net.blocks[0])
    gc.disable()
    try:
        del net
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_is_broken_off_leaves_everything_in_its_place(error: type[BaseException]) -> None:
    net, x, calls = Net(), torch.randn(2, 8), []
    before = weights(net)

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:  # the whole, the first block, the second
            raise error

    Lender([net, *net.blocks], lambda _, __, w: w * 2, lambda _: True, stop)
    with pytest.raises(error):
        net(x)
    assert len(calls) == 3
    net(x)
    assert weights(net) == before


def test_tensors_share_memory_without_touching() -> None:
    sizes = [*torch.randint(1, 3000, (200,)).tolist(), 9000, 8192]
    chunks = packed(sizes, 8192)
    assert sorted(i for chunk in chunks for i, _, _ in chunk) == list(range(len(sizes)))
    for chunk in chunks:
        places = sorted((start, end, sizes[i]) for i, start, end in chunk)
        assert all(end - start == size and start % ALIGNMENT == 0 for start, end, size in places)
        assert all(one[1] <= other[0] for one, other in pairwise(places))
        assert places[-1][1] <= 8192 or len(places) == 1
    assert len(chunks) < 1.2 * sum(sizes) / 8192 + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [8, 2**17])  # copies are slower than the work, and the other way round
def test_two_blocks_at_most_are_on_the_gpu(rows: int) -> None:
    width, blocks = 2048, 12
    net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(blocks))).requires_grad_(False)
    assert pin(net)
    x = torch.randn(rows, width, device="cuda")
    Lender([net, *net])
    net(x)  # products take their workspace, which stays
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        net(x)
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated() - before - 2 * x.nbytes
        assert most < 2.5 * 4 * width**2, f"{most / (4 * width**2):.1f} blocks"
    assert torch.cuda.memory_allocated() < before + x.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pinned", [False, True])
def test_host_weights_compute_on_the_gpu(pinned: bool) -> None:
    net, x = Net().requires_grad_(False), torch.randn(2, 8)
    wanted, before = net(x), {name: weight.device.type for name, weight in net.named_parameters()}
    if pinned:
        assert pin(net)
    Lender([net, *net.blocks])
    for _ in range(3):
        assert torch.allclose(net(x.cuda()).cpu(), wanted, atol=1e-5)
    assert {name: weight.device.type for name, weight in net.named_parameters()} == before
