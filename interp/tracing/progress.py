"""A progress bar over the cells of a sweep, or none."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Bar:
    """Counts what is done, and shows it where that is wanted; a context manager.

    Args:
        total: how much there is to do.
        show: whether to draw a bar.
    """

    def __init__(self, total: int, show: bool) -> None:
        self.total, self._show = total, show
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Bar:
        if self._show:
            from rich.progress import Progress

            self._bar = Progress()
            self._bar.start()
            self._task = self._bar.add_task("patching", total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """So many more are done."""
        if self._bar is not None:
            self._bar.advance(self._task, count)
