"""Attention knock-out: what is lost when some tokens may not look at others, in a window of layers.

Sources: "Cross-modal Information Flow in Multimodal Large Language Models" 2024, arXiv 2411.18620 (edges between groups
of tokens, windows of layers); Kaduri, Bagon, Dekel 2025, "What's in the Image? A Deep-Dive into the Vision of Vision
Language Models", arXiv 2411.17491 (image, prompt and answer).

    scores(query, key) = -inf   for the queries of one group and the keys of another, all heads, layers around l
    effect = (metric - metric with the edges cut) / metric,    the share of the metric that is lost

Departures: the mask of the model stays as it is, padding included, and only the chosen edges are cut (the published
code builds a new one). A window of 9 layers is its default, clipped at both ends. The other probabilities of a row
grow, since the softmax is taken behind the cut.

What it does not see: information that has moved to other tokens below the window, and detours inside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from interp.batch import Batch
from interp.edits import mask_attention
from interp.errors import SettingsError, UnsupportedError
from interp.heads.common import Answers, settings_of, token_ids
from interp.lens import Lens
from interp.reads import Positions, Read, check_positions
from interp.tracing.bundles import bundles_of
from interp.tracing.carried import Carried
from interp.tracing.causal_map import CausalMap
from interp.tracing.checkpoint import Checkpoint
from interp.tracing.grid import Cell, Group, Place, cells_of, marked
from interp.tracing.metrics import UNITS, Metric, build, metric_name
from interp.tracing.pair import Pair
from interp.tracing.planning import limits_of
from interp.tracing.progress import Bar

Edge = tuple[Positions, Positions]


def attention_knockout(
    lens: Lens,
    batch: Batch,
    edges: Mapping[str, Edge],
    *,
    layers: int | Sequence[int] | None = None,
    window: int = 9,
    metric: Metric | None = None,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    memory: int | None = None,
    rows: int | None = None,
    progress: bool = False,
) -> CausalMap:
    """Cut attention between groups of tokens in windows of layers, and measure what the answer loses.

    Args:
        lens: a language model, with or without images.
        batch: prompts.
        edges: by name, where information comes from (the keys) and where it goes to (the queries), such as
            `{"image to last": ("image", "last")}`; positions of any form (see `interp.reads.check_positions`).
        layers: the middles of the windows; None for all layers.
        window: how many layers are cut together.
        metric: as in `patch_sweep`, but for `kl`; None takes the probability, or with `wrong` the logit difference.
        answers: right next tokens; None takes the tokens that the model gives (for a metric by name).
        wrong: wrong ones.
        memory: bytes that a pass may take; None for a part of what is free.
        rows: the most rows (copies of a prompt) in a pass.
        progress: whether to show a progress bar.

    Returns:
        The metric with each edge cut around each layer. The edges are its groups, `clean` is the model as it is, and
        `corrupt` is zero, so that an effect is the share of the metric that is lost.

    Raises:
        EditError: a query would be left with nothing to look at.
        InputError: positions that do not exist, or a group without any.
        SettingsError: no edge, or options that do not fit each other.
        UnsupportedError: the model has no logits, or gives no attention scores.
    """
    if not isinstance(edges, Mapping) or not edges or not all(len(e) == 2 for e in edges.values()):
        raise SettingsError("edges are a mapping from names to (from, to), with at least one.")
    if metric == "kl":
        raise SettingsError("metric 'kl' is zero for the model as it is, so no share of it can be lost.")
    if answers is None and wrong is None and not callable(metric) and metric != "loss":
        answers = lens.run(batch, "logits@last").logits[:, -1].argmax(-1)
        metric = metric or "probability"
    name = metric_name(metric, answers is not None, wrong is not None)
    good = None if answers is None else token_ids(lens, answers, len(batch))
    bad = None if wrong is None else token_ids(lens, wrong, len(batch), "wrong")
    measure = build(lens, metric, batch, answers=good, wrong=bad, at="last")
    place, names = Place("scores", None), list(edges)
    middles = cells_of(lens, [place], [Group("all", "all")], layers, "all", window)
    cells = [Cell(e, c.layer, c.layers, c.head, e) for c in middles for e in range(len(edges))]
    groups = [Group(n, check_positions(to)) for n, (_, to) in edges.items()]
    keys = [marked(check_positions(come), batch.mask, batch) for come, _ in edges.values()]
    pair = Pair(lens, batch, batch, (), (), [place] * len(edges), groups, cells, measure)
    limits = limits_of(lens, rows, memory)
    with Bar(len(cells) * len(batch), progress) as bar:
        try:
            carried = Carried(pair, limits)
        except UnsupportedError as error:
            values, base = _whole_runs(pair, edges, bar)
            way = f"whole runs, since {error}"
        else:
            base, way = carried.plain(), "carried"
            values = base[None].repeat(len(cells), 1)
            bundles = bundles_of(pair)
            for bundle in bundles:  # every layer of a window is cut on the way, the first one too
                bundle.boundary, bundle.later, bundle.made = bundle.layers[0], bundle.layers, False
                bundle.differs = torch.ones_like(carried.base.reach[:, carried.base.first :], dtype=torch.bool)
            sources = {(c.place, i): keys[c.place] for c in cells for i in c.layers}
            carried.block("000", bundles, sources, values, Checkpoint(None, {}), bar)
    for i, cell in enumerate(cells):
        values[i, ~pair.exists[cell.group]] = torch.nan
    settings = settings_of(lens, batch, method="attention_knockout", window=window, way=way)
    return CausalMap(
        values=values,
        clean=base,
        corrupt=torch.zeros_like(base),
        cells=torch.tensor([(0, c.layer, c.head, c.group) for c in cells]),
        exists=pair.exists,
        sites=("scores",),
        groups=tuple(names),
        direction="noise",
        metric=name,
        unit=UNITS.get(name, ""),
        settings=settings,
    )


def _whole_runs(pair: Pair, edges: Mapping[str, Edge], bar: Bar) -> tuple[Tensor, Tensor]:
    """One run for each cell."""
    lens, output = pair.lens, Read("logits", positions=pair.measure.positions)
    every = torch.arange(len(pair.base), device=pair.base.mask.device)

    def value(logits: Tensor) -> Tensor:
        return pair.measure(logits if pair.measure.ids is None else logits[..., pair.measure.ids], every).cpu()

    values, ends = [], list(edges.values())
    for cell in pair.cells:
        come, to = ends[cell.group]
        cut = mask_attention(queries=to, keys=come, layers=cell.layers)
        values.append(value(lens.run(pair.base, output, cut).logits))
        bar.advance(len(pair.base))
    return torch.stack(values), value(lens.run(pair.base, output).logits)
