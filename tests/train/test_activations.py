"""Activation checkpointing computes the same gradients, and again only what it says."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from turbowan.errors import CheckpointError
from turbowan.models.transformer import TransformerConfig, WanTransformer
from turbowan.train.activations import checkpoint_activations

SIZES = TransformerConfig(dim=256, ffn_dim=192, num_layers=2, text_dim=24, freq_dim=64)


class Counted(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 16, 2, 4, 6), torch.tensor([900.0, 300.0]), torch.randn(2, 3, 24)


@pytest.mark.parametrize(("kind", "products", "rest"), [("none", 0, 0), ("mm_only", 0, 1), ("block", 1, 1)])
def test_gradients_are_the_same_and_only_what_was_dropped_is_made_again(kind, products, rest, fresh_seed):
    net = WanTransformer(SIZES)
    given = inputs()
    for count in ("addmm", "gelu"):
        with Counted() as plain:
            net(*given).square().mean().backward()
        expected = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        checkpoint_activations(net, kind)
        checkpoint_activations(net, kind)  # twice is once
        with Counted() as ours:
            net(*given).square().mean().backward()
        for gradient, p in zip(expected, net.parameters(), strict=True):
            assert torch.equal(gradient, p.grad)
        net.zero_grad()
        in_blocks = {"addmm": 9, "gelu": 1}[count] * SIZES.num_layers  # a block's last product is what it gives away
        again = products if count == "addmm" else rest
        assert ours.counts[count] - plain.counts[count] == again * in_blocks
        checkpoint_activations(net, "none")


def test_nothing_changes_without_gradients(fresh_seed):
    net = WanTransformer(SIZES)
    x, t, text = inputs()
    results = []
    for kind in ("none", "block"):
        checkpoint_activations(net, kind)
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.ones_like(x)), t, text))
            results.append((dual.primal, dual.tangent))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].abs().max() > 0


def test_an_unknown_kind_is_one_line():
    with pytest.raises(CheckpointError, match="must be one of none, mm_only, block, got 'all'"):
        checkpoint_activations(WanTransformer(SIZES), "all")
