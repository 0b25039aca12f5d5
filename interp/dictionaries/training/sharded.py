"""A dictionary spread over processes: each keeps its part of the weights, the gradients and Adam's means.

FSDP2 (`torch.distributed.fsdp.fully_shard`, parameters as DTensors): weights are gathered for a forward and backward
pass, and gradients are averaged and scattered on the way, so that of what training with Adam needs (weights, gradients,
two means) all but the gathered weights and their gradients is divided by the number of processes.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

M = TypeVar("M", bound=nn.Module)


def sharded(module: M) -> M:
    """A copy that is spread over all processes and trained through `loss`; the module stays as it is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Where the processes talk is where the parts are: a module on the CPU reaches the GPUs in parts only.
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    spread = copy.deepcopy(module)
    fully_shard(spread, mesh=init_device_mesh(kind, (dist.get_world_size(),)))
    register_fsdp_forward_method(spread, "loss")
    for name, value in spread.named_buffers():
        spread.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], value.to(kind))
    return spread


def whole(value: Tensor) -> Tensor:
    """A tensor with all its parts; every process has to call this."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, spread as another one is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


@torch.no_grad()
def gather(spread: nn.Module, module: nn.Module) -> None:
    """Give a module the weights and buffers of its spread copy."""
    module.load_state_dict({name: whole(value).to("cpu") for name, value in spread.state_dict().items()})
