"""Path patching: what a head gives to the logits, or to the queries, keys or values of later heads, directly.

Source: Wang, Variengien, Conmy, Shlegeris, Steinhardt 2022, "Interpretability in the Wild: a Circuit for Indirect
Object Identification in GPT-2 small", arXiv 2211.00593, section 3 and appendix B, and its code; Merullo, Eickhoff,
Pavlick 2024, "Circuit Component Reuse Across Tasks in Transformer Language Models", arXiv 2310.08744.

For a sender h and receivers R:

    1. the base run with h's output (`z`) set to its value in the source run and every other head's held at its value in
       the base run: what do R's queries (keys, values) or the logits get?
    2. the base run with R's queries (keys, values) set to that, together, and everything else computed: value(h, R).
       For the logits the first run is all.

Between h and R a change can only pass through the residual stream and, where they are recomputed, through MLPs
(`mlps`). Of the published code's helpers, the one of the main experiments recomputes MLPs and the one of the circuit
discovery freezes them unless told otherwise; recomputed is the default here. The final norm is recomputed always, as
are the norms in front of receivers. The published number is the change over the base run, (value - base) / base; the
effect of a `CausalMap` is the change over that of patching everything, (value - base) / (source - base), as in Merullo
et al.

Frozen attention moves nothing between positions, so that one row for a sender serves all groups of positions; with MLPs
frozen too, what a sender gives is added to the stream, and all senders are one product. Rows begin at the first column
and layer that matter.

What it does not see: paths through other heads (that is what it leaves out); that a backup head would do the work when
a sender is gone. Key/value heads that several query heads share are one receiver: all these heads get the change. What
recurrent mixers and cross-attention add is frozen like other heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from interp.batch import Batch
from interp.errors import EditError, SettingsError, UnknownNameError, UnsupportedError, unknown
from interp.headlist import HeadList
from interp.heads.common import Answers
from interp.lens import Lens
from interp.reads import Positions
from interp.tracing.causal_map import CausalMap
from interp.tracing.grid import Groups
from interp.tracing.grid_run import Direction, GridRun
from interp.tracing.metrics import Metric
from interp.tracing.paths import Paths, Route, Sender
from interp.tracing.planning import limits_of
from interp.tracing.progress import Bar

Via = Literal["q", "k", "v"]
Heads = Sequence[tuple[int, int]] | Sequence[str] | Any
"""(layer, head) pairs, names such as "9.6", or a frame with these columns."""


def path_patching(
    lens: Lens,
    clean: Batch | Sequence[Batch],
    corrupt: Batch | Sequence[Batch],
    *,
    senders: Heads | None = None,
    receivers: Literal["logits"] | Heads = "logits",
    via: Via = "q",
    positions: Groups = "last",
    mlps: Literal["recomputed", "frozen"] = "recomputed",
    metric: Metric | None = None,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    at: Positions = "last",
    direction: Direction = "noise",
    min_gap: float = 0.1,
    memory: int | None = None,
    rows: int | None = None,
    progress: bool = False,
) -> CausalMap:
    """Patch the direct path from each sender to the receivers, and measure what that does at the logits.

    Args:
        lens: a language model (decoder or encoder-decoder), with or without images, whose layers can be called alone.
        clean: the prompts on which the model does what is studied, in one batch or several.
        corrupt: the same prompts changed, prepared alike: as many columns, the same padding.
        senders: heads, each by itself: (layer, head) pairs, names such as "9.6", or a frame with the columns `layer`
            and `head`; None for all heads below the highest receiver.
        receivers: `logits`, or heads, which get their changed inputs together. With `k` and `v` they are key/value
            heads.
        via: through which input of the receiving heads.
        positions: where senders are patched, as in `patch_sweep`: `last`, `all`, `each`, ints or named groups. What
            receivers get changes at these positions only, and for the logits only those count where these are read.
        mlps: whether MLPs between sender and receiver are computed from what reaches them, or held at the base run.
        metric: as in `patch_sweep`.
        answers: right next tokens of all prompts in order.
        wrong: wrong ones.
        at: where a function or the divergence gets its logits.
        direction: `noise` puts the corrupt run's senders into the clean run, as in the paper; `denoise` the clean run's
            into the corrupt one.
        min_gap: see `CausalMap`.
        memory: bytes that a pass may take; None for a part of what is free.
        rows: the most rows (copies of a prompt) in a pass.
        progress: whether to show a progress bar.

    Returns:
        A map of site `z` with a cell for each sender and group of positions; `settings` names the receivers, and in
        `way` how it was computed.

    Raises:
        InputError: prompts that do not match, equal prompts, a metric that is the same in both runs, positions that do
            not exist, answers that do not fit.
        UnknownNameError: a head, metric, direction, input or way with MLPs does not exist.
        SettingsError: heads that are no list of heads, a sender that is not below the highest receiver, numbers outside
            their range.
        UnsupportedError: the model has no logits, its layers cannot be called alone, or they do not give `z` or the
            receivers' input.
        NonFiniteError: a run or the metric gives NaN.
    """
    for name, number in {"memory": memory, "rows": rows}.items():
        if number is not None and (type(number) is not int or number < 1):
            raise SettingsError(f"{name} is a whole number from 1, got {number!r}.")
    if via not in ("q", "k", "v"):
        raise unknown("input of receivers", via, ("q", "k", "v"))
    if mlps not in ("recomputed", "frozen"):
        raise unknown("way with MLPs", mlps, ("recomputed", "frozen"))
    to_logits = isinstance(receivers, str) and receivers == "logits"
    received = None if to_logits else _heads(lens, receivers, "receivers", via)
    sending = _senders(lens, senders, None if received is None else max(layer for layer, _ in received))
    options: dict[str, Any] = {"metric": metric, "answers": answers, "wrong": wrong, "at": at, "direction": direction}
    layers = sorted({layer for layer, _ in sending})
    run = GridRun.of(
        lens, clean, corrupt, sites="z", layers=layers, positions=positions, heads="each", window=1, **options
    )
    cells = [cell for cell in run.cells if (cell.layer, cell.head) in set(sending)]
    run = replace(run, cells=cells)
    by_layer: dict[int, tuple[int, ...]] = {}
    for layer, head in sorted(received or ()):
        by_layer[layer] = (*by_layer.get(layer, ()), head)
    route = Route(tuple(sending), None if received is None else by_layer, via, mlps == "frozen")
    limits, found = limits_of(lens, rows, memory), []
    with Bar(len(cells) * len(run), progress) as bar:
        for pair in run.pairs():
            try:
                paths = Paths(pair, route, limits)
            except UnsupportedError as error:
                raise UnsupportedError(f"{lens.name}: paths cannot be patched: {error}") from error
            found.append(paths.patched(bar))
    told: Any = "logits" if received is None else [f"{layer}.{head}" for layer, head in received]
    settings = run.settings(method="path_patching", receivers=told, mlps=mlps)
    settings |= {} if received is None else {"via": via}
    settings["way"] = "; ".join(dict.fromkeys(f.way for f in found))
    return run.result(found, min_gap, settings)


def _senders(lens: Lens, senders: Heads | None, top: int | None) -> list[Sender]:
    """The senders, lowest layers first; all heads below the highest receiver where none are named."""
    if senders is None:
        layers = [i for i in lens.layers_with("z") if top is None or i < top]
        found = [(i, h) for i in layers for h in range(lens.anatomy.attention(None, i, "z").n_heads)]
        if not found:
            raise SettingsError(f"no head lies below the highest receiver, in layer {top}.")
        return found
    found = sorted(_heads(lens, senders, "senders", "z"))
    above = [f"{layer}.{head}" for layer, head in found if top is not None and layer >= top]
    if above:
        raise SettingsError(
            f"sender {above[0]} is not below the highest receiver, in layer {top}: it gives it nothing."
        )
    return found


def _heads(lens: Lens, heads: Heads, name: str, site: str) -> list[Sender]:
    """A list of heads, checked.

    Raises:
        SettingsError: it is no list of heads, or names one of them twice.
        UnknownNameError: a head does not exist.
        UnsupportedError: a layer cannot give the site.
    """
    listed: Any = heads
    if isinstance(heads, str):
        raise SettingsError(f"{name}={heads!r}: give a list of heads" + (" or 'logits'." if site != "z" else "."))
    if not hasattr(heads, "columns"):
        listed = [_named(one, name) if isinstance(one, str) else one for one in heads]
    try:
        pairs = HeadList.of(listed).pairs
    except EditError as error:
        raise SettingsError(f"{name}: {error}") from error
    tower, found = lens.anatomy.towers[lens.anatomy.main], []
    for layer, head in pairs:
        index = tower.layer(layer).index
        part = lens.anatomy.attention(None, index, site)
        count = part.n_kv_heads if site in ("k", "v") else part.n_heads
        if not -count <= head < count:
            what = "key/value heads" if site in ("k", "v") else "heads"
            raise UnknownNameError(
                f"{name}: head {head} of layer {index} does not exist: the layer has {count} {what}."
            )
        found.append((index, head % count))
    if len(set(found)) != len(found):
        raise SettingsError(f"{name} name a head twice: {found}.")
    return found


def _named(text: str, name: str) -> tuple[int, int]:
    layer, _, head = text.partition(".")
    if not (layer.isdigit() and head.isdigit()):
        raise SettingsError(f"{name}: a head is named by its layer and number, such as '9.6', not {text!r}.")
    return int(layer), int(head)
