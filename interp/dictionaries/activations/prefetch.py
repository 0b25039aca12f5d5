"""`Prefetch`: the next items of a source, made in the background while the current one is in use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from interp.dictionaries.activations.batches import Source, State
from interp.errors import SettingsError

T = TypeVar("T")
_WAIT = 0.1


@dataclass(frozen=True, slots=True)
class _Made(Generic[T]):
    item: T | None
    after: State | None
    error: BaseException | None = None


class Prefetch(Generic[T]):
    """A source whose next items are made by a thread; see `Source`.

    The state is that of what was handed out, not of what was made ahead. The source's own states are kept for each
    item, so they must be small: put it in front of a `MixingBuffer`, not behind it. An error of the source is raised
    where the item would have come; after it, or an interrupt, the state still is that of the last item.

    On a machine without an accelerator the thread and the training share the cores, and nothing is won.

    Args:
        source: what is read ahead; nobody else may use it. Other runs of its model take turns with the thread.
        depth: items made ahead; each is held in memory. 0 makes each when it is asked for, without a thread.

    Raises:
        SettingsError: `depth` is negative.
    """

    def __init__(self, source: Source[T], *, depth: int = 1) -> None:
        if depth < 0:
            raise SettingsError(f"depth counts the items made ahead, from 0 on; found {depth}.")
        self.source, self.depth = source, depth
        self._after = self._small(source.state())
        self._queue: queue.Queue[_Made[T]] = queue.Queue(max(depth, 1))
        self._stop = threading.Event()
        self._busy = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ended = False

    @staticmethod
    def _small(state: State) -> State:
        if state.tensors:
            raise SettingsError(
                "Prefetch keeps a state for each item, and this source's holds tensors: put it in front of the buffer."
            )
        return state

    @property
    def d_in(self) -> Mapping[str, int]:
        """Width of each read."""
        return self.source.d_in

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the source: reading ahead changes nothing."""
        return self.source.settings

    def __iter__(self) -> Prefetch[T]:
        """Itself."""
        return self

    def __next__(self) -> T:
        """The next item."""
        if self._ended:
            raise StopIteration
        made = self._one() if self.depth == 0 else self._from_thread()
        if made.error is not None:
            self._join()
            self.source.restore(self._after)
            raise made.error
        if made.after is None:
            self._join()
            self._ended = True
            raise StopIteration
        self._after = made.after
        return made.item  # type: ignore[return-value]

    def _from_thread(self) -> _Made[T]:
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._work, name="interp-prefetch", daemon=True)
            self._thread.start()
        while True:
            try:
                return self._queue.get(timeout=_WAIT)
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    raise RuntimeError("the thread that reads ahead ended without a word.") from None

    def _one(self) -> _Made[T]:
        try:
            with self._busy:
                item = next(self.source)
                return _Made(item, self._small(self.source.state()))
        except StopIteration:
            return _Made(None, None)
        except BaseException as error:
            return _Made(None, None, error)

    def _work(self) -> None:
        while not self._stop.is_set():
            made = self._one()
            while not self._stop.is_set():
                try:
                    self._queue.put(made, timeout=_WAIT)
                    break
                except queue.Full:
                    continue
            if made.after is None:
                return

    def _join(self) -> None:
        """End the thread and forget what it made."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        while not self._queue.empty():
            self._queue.get_nowait()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is made ahead inside this block: for other uses of the same model, such as evaluation."""
        with self._busy:
            yield

    def state(self) -> State:
        """The source's place behind the last item that was handed out."""
        return self._after

    def restore(self, state: State) -> None:
        """Go to a place of the source."""
        self._join()
        self.source.restore(state)
        self._after = self._small(self.source.state())
        self._ended = False

    def close(self) -> None:
        """End the thread, and close the source."""
        self._join()
        self._ended = True
        self.source.close()
