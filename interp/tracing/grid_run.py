"""What every method over a grid of cells shares: its arguments, checked, as pairs of batches, and its result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from interp.batch import Batch
from interp.edits import Edit
from interp.errors import InputError, SettingsError, unknown
from interp.heads.common import Answers, settings_of, token_ids
from interp.lens import Lens
from interp.reads import Positions
from interp.tracing.causal_map import CausalMap
from interp.tracing.grid import Cell, Group, Groups, Heads, Place, cells_of, groups_of, places_of
from interp.tracing.metrics import UNITS, Metric, build, metric_name
from interp.tracing.pair import INSIDE, Found, Pair
from interp.tracing.prompts import Edits, batches_of, check_differ, embedding_edits, tokens_of

Direction = Literal["denoise", "noise"]


@dataclass(frozen=True, slots=True, eq=False)
class GridRun:
    """The arguments of a method over a grid. Made by `GridRun.of`.

    Attributes:
        lens: the model.
        batches: clean and corrupt, in pairs.
        edits: edits of `embed` in the clean and in the corrupt run.
        places: the sites.
        groups: the groups of positions.
        cells: the cells.
        metric: the metric as it was given.
        name: its name.
        answers: right next tokens of all prompts, or None.
        wrong: wrong ones, or None.
        at: where a function or the divergence gets its logits.
        direction: `denoise` or `noise`.
        severed: what is held at its value in the base run beside what is patched, or None.
    """

    lens: Lens
    batches: Sequence[tuple[Batch, Batch]]
    edits: tuple[Sequence[Edit], Sequence[Edit]]
    places: Sequence[Place]
    groups: Sequence[Group]
    cells: Sequence[Cell]
    metric: Metric | None
    name: str
    answers: Int[Tensor, " prompt"] | None
    wrong: Int[Tensor, " prompt"] | None
    at: Positions
    direction: Direction
    severed: Place | None = None

    @staticmethod
    def of(
        lens: Lens,
        clean: Batch | Sequence[Batch],
        corrupt: Batch | Sequence[Batch],
        *,
        sites: str | Sequence[str],
        layers: int | Sequence[int] | None,
        positions: Groups,
        heads: Heads,
        window: int,
        metric: Metric | None,
        answers: Answers | None,
        wrong: Answers | None,
        at: Positions,
        direction: Direction,
        clean_edits: Edits = (),
        corrupt_edits: Edits = (),
        severed: str | None = None,
    ) -> GridRun:
        """The arguments, checked; see `patch_sweep`."""
        if direction not in ("denoise", "noise"):
            raise unknown("direction", direction, ("denoise", "noise"))
        places, both = places_of(lens, sites), batches_of(clean, corrupt)
        edits = (embedding_edits(clean_edits, "clean"), embedding_edits(corrupt_edits, "corrupt"))
        if not any(edits):
            check_differ(both)
        total = sum(len(one) for one, _ in both)
        name = metric_name(metric, answers is not None, wrong is not None)
        good = None if answers is None else token_ids(lens, answers, total)
        bad = None if wrong is None else token_ids(lens, wrong, total, "wrong")
        groups = groups_of(positions, [one for one, _ in both])
        cells = cells_of(lens, places, groups, layers, heads, window)
        held = None if severed is None else _severed(lens, severed)
        return GridRun(lens, both, edits, places, groups, cells, metric, name, good, bad, at, direction, held)

    def __len__(self) -> int:
        """Number of prompts."""
        return sum(len(clean) for clean, _ in self.batches)

    def pairs(self) -> Iterator[Pair]:
        """The pairs of batches with what is patched and measured in them.

        Raises:
            InputError: a group holds no position of a pair.
        """
        first = 0
        for clean, corrupt in self.batches:
            some = slice(first, first := first + len(clean))
            good, bad = (None if x is None else x[some] for x in (self.answers, self.wrong))
            measure = build(self.lens, self.metric, clean, answers=good, wrong=bad, at=self.at)
            runs = [(clean, self.edits[0]), (corrupt, self.edits[1])]
            (source, source_edits), (base, base_edits) = runs if self.direction == "denoise" else reversed(runs)
            grid = (self.places, self.groups, self.cells, measure, self.severed)
            pair = Pair(self.lens, source, base, source_edits, base_edits, *grid)
            for group, there in zip(self.groups, pair.exists, strict=True):
                if not group.single and not bool(there.any()):
                    raise InputError(f"group {group.name!r} holds no position of any prompt.")
            yield pair

    def settings(self, **more: Any) -> dict[str, Any]:
        """What a result records."""
        clean = [one for one, _ in self.batches]
        own = {"prompts": len(self), "tokens": sum(int(b.mask.sum()) for b in clean)}
        at = {"at": str(self.at)} if callable(self.metric) or self.name == "kl" else {}
        return settings_of(self.lens, clean[0], **more) | own | at

    def result(self, found: Sequence[Found], min_gap: float, settings: dict[str, Any]) -> CausalMap:
        """The result, from what was found in each pair.

        Raises:
            InputError: the metric is the same in both runs.
        """
        source, base = (torch.cat([getattr(f, n) for f in found]) for n in ("source", "base"))
        if bool((source == base).all()):
            raise InputError(
                f"metric {self.name} is the same in the clean and the corrupt run: there is nothing to bring back."
            )
        single = all(g.single for g in self.groups)
        return CausalMap(
            values=torch.cat([f.values for f in found], 1),
            clean=source if self.direction == "denoise" else base,
            corrupt=base if self.direction == "denoise" else source,
            cells=torch.tensor([(c.place, c.layer, c.head, c.group) for c in self.cells]),
            exists=torch.cat([f.exists for f in found], 1),
            sites=tuple(map(str, self.places)),
            groups=tuple(g.name for g in self.groups),
            direction=self.direction,
            metric=self.name,
            unit=UNITS.get(self.name, ""),
            single=single,
            tokens=tokens_of(self.lens, [one for one, _ in self.batches], self.groups) if single else (),
            min_gap=float(min_gap),
            settings=settings,
        )


def _severed(lens: Lens, site: str) -> Place:
    """What is held beside patches.

    Raises:
        SettingsError: it is not what a module adds to the stream.
    """
    (place,) = places_of(lens, site)
    if place.site not in INSIDE:
        raise SettingsError(f"severed is what a module adds to the stream ({', '.join(INSIDE)}), not {site!r}.")
    return place
