"""The log of a run: rows of numbers, as a parquet file, in TensorBoard, in Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import MissingPackageError, unknown
from interp.files import write_parquet

if TYPE_CHECKING:
    import pandas as pd

WRITERS = ("tensorboard", "wandb")
TIMES = ("seconds", "tokens_per_second")
"""Columns that differ from run to run."""


class Log:
    """Rows by step, kept in `FOLDER/metrics.parquet`.

    Args:
        folder: of the run; None keeps rows in memory.
        writers: `tensorboard`, `wandb`: where rows go as well.
        about: the run's settings, for those.
        step: the step at which it is taken up; TensorBoard takes back what it showed of later ones.
        rows: the rows up to there.

    Raises:
        UnknownNameError: there is no such writer.
        MissingPackageError: its package is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        writers: Sequence[str],
        about: dict[str, Any],
        *,
        step: int = 0,
        rows: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.path = None if folder is None else Path(folder) / "metrics.parquet"
        self.rows = list(rows)
        self._writers: list[Any] = []
        for name in writers:
            if name not in WRITERS:
                raise unknown("writer", name, WRITERS)
            self._writers.append((_tensorboard if name == "tensorboard" else _wandb)(folder, about, step))

    def add(self, row: dict[str, Any]) -> None:
        """One row of one dictionary."""
        self.rows.append(row)
        numbers = {k: v for k, v in row.items() if k not in ("dictionary", "step")}
        for write in self._writers:
            write(row["dictionary"], numbers, row["step"])

    def frame(self) -> pd.DataFrame:
        """All rows."""
        import pandas

        return pandas.DataFrame(self.rows)

    def flush(self) -> None:
        """Write the parquet file."""
        if self.path is not None and self.rows:
            write_parquet(self.path, self.frame())


def _tensorboard(folder: Any, about: dict[str, Any], step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingPackageError("the log for TensorBoard needs `pip install tensorboard`.") from error
    writer = SummaryWriter(str(Path(folder or ".") / "tensorboard"), purge_step=step or None)

    def write(name: str, numbers: dict[str, Any], at: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(f"{name}/{key}", value, at)
        writer.flush()

    return write


def _wandb(folder: Any, about: dict[str, Any], step: int) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingPackageError("the log for Weights & Biases needs `pip install wandb`.") from error
    run = wandb.init(dir=str(folder or "."), config=about, resume="allow")

    def write(name: str, numbers: dict[str, Any], at: int) -> None:
        run.log({f"{name}/{key}": value for key, value in numbers.items()}, step=at)

    return write
