"""The work of a command divided over the processes that torchrun started; results meet in files of the run folder."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.results import Scores


class Together:
    """The processes of a command; with a single one everything is its own.

    All see the same file system. The first prints and writes what stays.

    Attributes:
        rank: number of this process.
        world: how many there are.
    """

    def __init__(self, device: str | None = None) -> None:
        self.rank, self.world, self._processes = 0, 1, None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from interp.processes import Processes

            self._processes: Any = Processes.join(device)
            self.rank, self.world = self._processes.rank, self._processes.world
            if self.rank:
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every process is here."""
        if self._processes is not None:
            self._processes.wait()

    def least(self, count: int) -> int:
        """The least of the numbers that the processes have."""
        if self._processes is None:
            return count
        import torch

        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        return int(self._processes.reduce(torch.tensor(count, device=device), "min"))

    def mine(self, count: int) -> list[int]:
        """The numbers of the pieces, out of so many, that this process computes."""
        return list(range(self.rank, count, self.world))

    def exchanged(self, made: "Mapping[int, Scores]", folder: Path) -> "Sequence[Any]":
        """The results of all processes in the order of their numbers, on every process.

        Args:
            made: this process's results by number.
            folder: a folder for as long as they are exchanged.
        """
        if self.world == 1:
            return [made[i] for i in sorted(made)]
        from interp.scores import load

        for number, result in made.items():
            result.save(folder / f"{number:05d}")
        self.wait()
        found = [load(path) for path in sorted(folder.iterdir())] if folder.is_dir() else []
        self.wait()
        if self.first:
            shutil.rmtree(folder, ignore_errors=True)
        self.wait()
        return found
