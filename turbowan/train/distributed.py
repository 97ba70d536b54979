"""The same training under `torchrun`: one process per GPU, weights sharded or gradients averaged, rank 0 writes."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..errors import MachineError


def join(device: torch.device) -> torch.device:
    """Join the group that torchrun started, if any; returns this process's own device."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rows_of_rank(batch: int, accumulate: int = 1) -> range:
    """This process's slice of a global batch, which it goes through in `accumulate` equal parts.

    Raises:
        MachineError: the batch cannot be split evenly.
    """
    if batch % (world_size() * accumulate):
        raise MachineError(
            f"a batch of {batch} cannot be split evenly over {world_size()} processes x {accumulate} parts;"
            " start a number of processes that divides it, or change `batch`"
        )
    count = batch // world_size()
    return range(rank() * count, (rank() + 1) * count)


def place(net: nn.Module, device: torch.device, half: bool = False) -> None:
    """Bring a module to the device, in place; under torchrun sharded over all processes with FSDP2.

    Rank 0's weights count, on a CPU or the device; the other processes may hold the module on the meta device. No
    process has more than its shards and one block on its device. Each block is sharded by itself, the rest together.
    With `half` the blocks are gathered in bfloat16; what is around them stays in the parameters' dtype, and gradients
    are reduced in float32.
    """
    if isinstance(net, FSDPModule):
        return
    if world_size() == 1:
        net.to(device)
        return
    weights = net.state_dict() if rank() == 0 else {}
    net.to("meta")
    mesh = init_device_mesh(device.type, (world_size(),))
    gathered = torch.bfloat16 if half else None
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks_of(net):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    around = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(net, mesh=mesh, mp_policy=around)
    net.to_empty(device=device)
    set_model_state_dict(net, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """A transformer's blocks; none of a module without them."""
    blocks = getattr(net, "blocks", None)
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, over the same memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full value of a sharded tensor, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Mean of the gradients over all processes, in one message."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def average(values: Tensor) -> Tensor:
    """Mean of a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def from_rank_0(value: float, device: torch.device) -> float:
    """Rank 0's value, on every process."""
    if world_size() == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return float(shared)
