"""Tensor parallelism: what each process holds a part of is put together for reads, and taken apart after edits.

Under a `tp_plan` of transformers every process computes some of the heads and some of the MLP's neurons. The processes
carry out the same reads and edits; a site that lies in parts is gathered on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from interp.engine.attention import AttentionCall
from interp.errors import UnsupportedError


@dataclass(frozen=True, slots=True, eq=False)
class Shards:
    """The processes that hold the parts of something, in their order.

    Attributes:
        group: the process group.
        rank: number of this process in it.
        count: how many there are.
    """

    group: Any
    rank: int
    count: int

    def whole(self, part: Tensor, axis: int) -> Tensor:
        """The parts of all processes, joined along an axis."""
        from torch import distributed as dist

        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.count)]
        dist.all_gather(parts, part, group=self.group)
        return torch.cat(parts, axis)

    def own(self, whole: Tensor, axis: int) -> Tensor:
        """This process's part."""
        return whole.chunk(self.count, axis)[self.rank]

    def call(self, call: AttentionCall) -> AttentionCall:
        """An attention call with the heads of all processes.

        Raises:
            UnsupportedError: its mask or its sinks differ between heads.
        """
        if isinstance(call.mask, Tensor) and call.mask.ndim == 4 and call.mask.shape[1] > 1:
            raise UnsupportedError("scores and pattern of heads with masks of their own are not put together.")
        if any(isinstance(x, Tensor) and x.ndim for n, x in call.options.items() if n in ("s_aux", "position_bias")):
            raise UnsupportedError("scores and pattern of heads with sinks or a position bias are not put together.")
        joined = {name: self.whole(getattr(call, name), 1) for name in ("query", "key", "value")}
        return replace(call, **joined, values={})


def shards_of(module: nn.Module | None, axis: int = -1) -> Shards | None:
    """The processes that hold the parts of a projection's input; None where it lies in one piece.

    Args:
        module: the projection.
        axis: of its weight.
    """
    weight: Any = getattr(module, "weight", None)
    if not is_spread(weight):
        return None
    for number, placement in enumerate(weight.placements):
        if placement.is_shard() and placement.dim % weight.ndim == axis % weight.ndim:
            mesh = weight.device_mesh
            return Shards(mesh.get_group(number), mesh.get_local_rank(number), mesh.size(number))
    return None


def is_spread(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: one that processes share."""
    return hasattr(tensor, "full_tensor")


def spread(model: nn.Module) -> bool:
    """Whether processes share the parameters of a model."""
    return any(is_spread(p) for p in model.parameters())
