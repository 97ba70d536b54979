"""A state's tensors into a module built on the meta device. Nothing is allocated twice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.linear import Int8BlockLinear, Int8RowLinear, ScaledLinear
from .files import State
from .scales import FP8, expand
from .transfer import Item, transfer

Report = Callable[[int, int], None]  # bytes done and in all
EachBlock = Callable[[nn.Module], None]

# What the transformer computes in float32 whatever its dtype: a file's float32 is kept for it.
TRANSFORMER_FLOAT32 = ("time_embedding.", "time_projection.", "head.", "modulation", "norm")
# The large layers of both models; the others are few, and some of their weights are used outside of nn.Linear.
_BLOCK = re.compile(r"((?:.*\.)?blocks?\.\d+)\.")
_RUNS_IN_8_BITS = re.compile(r"(^|\.)blocks?\.\d+\.(?!.*proj_l$)")


def fit_quantized(net: nn.Module, state: State) -> State:
    """Make module and state agree on what is in 8 bits.

    Linear layers of the blocks whose weight the state holds in 8 bits are swapped for ones that compute with it; other
    8-bit weights (embeddings, the layers around the blocks) are expanded. Returns the state to assign.
    """
    state = dict(state)
    for name, module in list(net.named_modules()):
        weight = state.get(f"{name}.weight")
        is_block = f"{name}.int8_weight" in state
        if not is_block and (weight is None or weight.dtype not in (*FP8, torch.int8)):
            continue
        swapped = isinstance(module, nn.Linear) and _RUNS_IN_8_BITS.search(name) is not None
        if swapped and weight is not None and (weight.dtype in FP8 or module.bias is None):
            if weight.dtype == torch.int8:
                state[f"{name}.scale_weight"] = state.pop(f"{name}.weight_scale").flatten()
            layer = ScaledLinear(module.in_features, module.out_features, module.bias is not None, weight.dtype, "meta")
            layer.scale_weight = state.setdefault(f"{name}.scale_weight", torch.ones(1)).to("meta")
            net.set_submodule(name, layer)
        elif swapped and module.bias is not None:
            kind = Int8BlockLinear if is_block else Int8RowLinear
            net.set_submodule(name, kind(module.in_features, module.out_features, "meta"))
        else:
            expand(state, name)
    return state


def check_fit(net: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """See that a state has a module's keys and shapes, and no others.

    Raises:
        CheckpointError: keys missing or left over, or a shape that differs, with counts and an example.
    """
    wanted = net.state_dict()
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing or extra:
        parts = [
            f"{len(keys)} tensors are {what} (e.g. {keys[0]})"
            for keys, what in ((missing, "missing"), (extra, "not part of it"))
            if keys
        ]
        raise CheckpointError(f"{name} does not fit this model: {', '.join(parts)}")
    for key, value in wanted.items():
        if state[key].shape != value.shape:
            raise CheckpointError(
                f"{name}: {key} has shape {list(state[key].shape)}, expected {list(value.shape)}"
                " (are files of two sizes mixed?)"
            )


def assign(
    net: nn.Module,
    state: Mapping[str, Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
    float32_parts: Sequence[str] = (),
    report: Report | None = None,
    each_block: EachBlock | None = None,
) -> None:
    """Give a module the tensors of a state that fits it, on `device` and in `dtype`; 8-bit weights keep theirs.

    What the state lacks is left alone: `check_fit` comes first. On a CPU a tensor that has its dtype stays where it is,
    in its file if it is mapped; a GPU gets all of them in parallel reads (see `transfer`).

    Args:
        float32_parts: pieces of names; tensors with one of them stay in float32 where the state has them so.
        report: called with the bytes done and all there are.
        each_block: called with each block, in order, as soon as its weights are there and before the next one's: what
            it makes of them and where it puts them decides how much memory a load needs beside its result.
    """
    items = {
        key: Item(state[key].contiguous(), _target_dtype(key, state[key], wanted, dtype, float32_parts))
        for key, wanted in net.state_dict().items()
        if key in state
    }
    total, done = sum(item.source.nbytes for item in items.values()), 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if report is not None:
            report(done, total)

    groups, device = _by_block(items), torch.device(device)
    placed = transfer(list(groups.values()), device, count) if device.type != "cpu" else _converted(groups, count)
    for (prefix, _), tensors in zip(groups.items(), placed, strict=True):
        part = net.get_submodule(prefix)
        start = len(prefix) + 1 if prefix else 0
        part.load_state_dict({key[start:]: value for key, value in tensors.items()}, strict=bool(prefix), assign=True)
        part.requires_grad_(False)
        tensors.clear()  # or the ones that `each_block` replaces would stay
        if prefix and each_block is not None:
            each_block(part)


def _by_block(items: Mapping[str, Item]) -> dict[str, dict[str, Item]]:
    """Items by the block they are in, in order; first, under "", those in none."""
    groups: dict[str, dict[str, Item]] = {"": {}}
    for key, item in items.items():
        found = _BLOCK.match(key)
        groups.setdefault(found[1] if found else "", {})[key] = item
    return groups


def _converted(groups: Mapping[str, Mapping[str, Item]], count: Callable[[int], None]) -> Iterator[dict[str, Tensor]]:
    """As `transfer`, on a CPU."""
    for group in groups.values():
        yield {key: item.source.to(item.dtype) for key, item in group.items()}
        count(sum(item.source.nbytes for item in group.values()))


def _target_dtype(
    key: str, value: Tensor, wanted: Tensor, dtype: torch.dtype, float32_parts: Sequence[str]
) -> torch.dtype:
    if wanted.dtype in (*FP8, torch.int8):
        return wanted.dtype
    if key.endswith((".scale", ".weight_scale", ".scale_weight")):
        return torch.float32
    if value.dtype == torch.float32 and any(part in key for part in float32_parts):
        return torch.float32
    return dtype
