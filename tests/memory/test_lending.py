"""Weights lent to a block for its turn: what it computes with, and that everything is back in its place after."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from turbowan.memory.lending import Lender, pin

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
