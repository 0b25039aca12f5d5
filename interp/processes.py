"""The processes that work together (torch.distributed), or the one that is alone."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch import distributed as dist


class Processes:
    """Sums, means and minima over all processes; with a single one they are what they are given.

    Attributes:
        rank: number of this process.
        world: how many there are.
    """

    def __init__(self) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    def reduce(self, tensor: Tensor, how: Literal["sum", "min", "max"]) -> Tensor:
        """The sum, minimum or maximum over all processes, in place of the tensor."""
        if self.world > 1:
            dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[how])
        return tensor

    def average(self, gradients: Iterable[Tensor]) -> None:
        """The mean of each over all processes, in place."""
        for gradient in gradients if self.world > 1 else ():
            dist.all_reduce(gradient)
            gradient /= self.world

    def same(self, parameters: Iterable[Tensor]) -> None:
        """Give every process the first one's."""
        for parameter in parameters if self.world > 1 else ():
            dist.broadcast(parameter, 0)

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    @staticmethod
    def join(device: str | None = None) -> Processes:
        """Join the processes that `torchrun` started, where it did.

        Args:
            device: `cpu` for gloo; else NCCL where there are GPUs.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            on_gpu = torch.cuda.is_available() and device != "cpu"
            if on_gpu:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl" if on_gpu else "gloo")
            atexit.register(_leave)
        return Processes()


def _leave() -> None:
    """Leave the group before the interpreter ends: its threads let go of tensors, for which they need the interpreter.

    One that does so too late aborts the process (gloo, seen in about one of four runs that end with an `all_reduce`).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(0.1)
