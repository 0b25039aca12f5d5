"""What a command takes, before it begins: its time, its memory, and how many prompts go through the model at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from interp.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from interp.batch import Batch
    from interp.estimate import Estimate
    from interp.lens import Lens
    from interp.reads import Read


@dataclass(frozen=True, slots=True)
class Need:
    """What a method asks of the model.

    Attributes:
        name: what it is called.
        reads: what one of its runs reads.
        gradients: whether it takes gradients.
        runs: how many runs it makes of every prompt.
    """

    name: str
    reads: "tuple[str | Read, ...]"
    gradients: bool = False
    runs: float = 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What a method takes.

    Attributes:
        need: what it asks of the model.
        found: the estimate of one of its runs, on a batch of the longest prompts.
        seconds: of all its runs over all prompts.
    """

    need: Need
    found: "Estimate"
    seconds: float

    @property
    def each(self) -> int:
        """Bytes of one prompt."""
        return self.found.each + -(-self.found.returned // self.found.samples)

    @property
    def fits(self) -> int:
        """How many rows fit at once, however many prompts there are."""
        from interp.estimate import KEPT

        return int(KEPT * self.found.free) // max(1, self.each)

    def line(self, rows: int) -> str:
        """In words, for so many prompts at a time."""
        from interp.estimate import size

        found = self.found
        return (
            f"{self.need.name}: about {duration(self.seconds)}; {rows} prompts at a time take about "
            f"{size(rows * self.each)} of {size(found.free)} free on {found.device}"
        )


def costs_of(
    lens: "Lens", batch: "Batch", needs: Sequence[Need], prompts: int, *, share: float = 1.0
) -> dict[str, Cost]:
    """What methods take, by their names. One prompt of the batch is run once for all that ask the same.

    What the model cannot give is left out: the method itself says why.

    Args:
        lens: the model.
        batch: the longest prompts, as many as shall go through at once.
        needs: what the methods ask.
        prompts: how many there are in all.
        share: the mean length of all prompts, as a share of that of the batch's.
    """
    known: dict[object, Estimate] = {}
    costs = {}
    for need in needs:
        key = tuple(map(str, need.reads)), need.gradients
        if key not in known:
            try:
                known[key] = lens.estimate(batch, need.reads, gradients=need.gradients)
            except UnsupportedError:
                continue
        found = known[key]
        costs[need.name] = Cost(need, found, found.seconds / found.samples * prompts * share * need.runs)
    return costs


def rows_of(costs: Sequence[Cost], size: int, *, least: Callable[[int], int] = lambda count: count) -> int:
    """How many prompts all of the methods can take at once.

    Args:
        costs: of the methods.
        size: how many are wanted.
        least: gives the least of the numbers of all processes, where there are several.

    Raises:
        InputError: not even one fits.
    """
    from interp.estimate import size as words

    rows = least(min([size, *(cost.fits for cost in costs)]))
    if rows:
        return rows
    worst = max(costs, key=lambda cost: cost.each)
    raise InputError(
        f"{worst.need.name} does not fit: the longest prompt takes about {words(worst.each)}, and "
        f"{words(worst.found.free)} are free on {worst.found.device}: shorten the prompts, or give a smaller --dtype "
        "or another --device."
    )


def duration(seconds: float) -> str:
    """A time in words, to two digits."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
